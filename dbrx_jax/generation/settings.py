"""Turns a GenerationConfig into the arrays that the device programs take."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.filters import Filters, Nucleus
from dbrx_jax.generation.processes import same_on_all_processes
from dbrx_jax.generation.processors import CountPenalties, LengthPenalty, Processors, Sequences
from dbrx_jax.generation.sampling import Sampling, row_keys
from dbrx_jax.generation.state import Settings
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import Partition

MIN_EOS = 8  # length of the array of end-of-sequence ids, unless there are more


def make_settings(
    config: GenerationConfig,
    vocab_size: int,
    prompt_width: int,
    max_new_tokens: int,
    keys: np.ndarray | None,
    partition: Partition,
) -> Settings:
    """Returns the settings of rows that share all but their keys.

    Args:
      prompt_width: tokens of the padded prompts, from which min_length counts.
      keys: random keys of the rows (B, 2); None decodes greedily.

    Raises:
      GenerationError: a token is not in the vocabulary.
    """
    _check_vocabulary(config, vocab_size)
    padded_size = partition.pad_vocabulary(vocab_size)
    processors = make_processors(config, padded_size, prompt_width, max_new_tokens)
    sampling = None
    if keys is not None:
        sampling = Sampling(keys, _float(config.temperature or 1), make_filters(config, padded_size))
    eos = [i for i in config.eos_token_id if i < vocab_size]  # an id that pads the vocabulary is no token
    return Settings(padded_ids(eos)[None], processors, sampling)


def padded_ids(ids: Sequence[int]) -> np.ndarray:
    """Returns token ids in an array of MIN_EOS entries, or of twice that and so on if there are more."""
    size = max(MIN_EOS, 1 << (len(ids) - 1).bit_length() if ids else 0)
    return np.array([*ids, *[-1] * (size - len(ids))], np.int32)


def make_filters(config: GenerationConfig, vocab_size: int) -> Filters:
    top_k, top_p, min_p = config.top_k or 0, 1.0 if config.top_p is None else config.top_p, config.min_p or 0.0
    nucleus = None
    if top_k or top_p < 1 or min_p:
        nucleus = Nucleus(_int(min(top_k or vocab_size, vocab_size)), _float(top_p), _float(min_p))
    cutoffs = [config.epsilon_cutoff, config.eta_cutoff]
    epsilon, eta = (_float(c) if c is not None and 0 < c < 1 else None for c in cutoffs)
    typical = None if config.typical_p in (None, 1) else _float(config.typical_p)
    return Filters(nucleus, typical, epsilon, eta)


def make_processors(config: GenerationConfig, vocab_size: int, prompt_width: int, max_new_tokens: int) -> Processors:
    biases: list[tuple[tuple[int, ...], float]] = [((i,), bias) for i, bias in (config.logit_bias or {}).items()]
    biases += list((config.sequence_bias or {}).items())
    eos = set(config.eos_token_id)
    bad_words = [(word, -np.inf) for word in config.bad_words_ids if not (len(word) == 1 and word[0] in eos)]
    penalties = CountPenalties(_float(config.frequency_penalty or 0), _float(config.presence_penalty or 0))
    min_new_tokens = config.min_new_tokens
    if min_new_tokens is None:
        min_new_tokens = (config.min_length or 0) - prompt_width
    forced = None
    if config.forced_eos_token_id:
        forced = _vector(vocab_size, [((i,), 0.0) for i in config.forced_eos_token_id], fill=-np.inf)
    penalty = config.exponential_decay_length_penalty
    ngram_size = config.no_repeat_ngram_size or 0  # one as long as prompt and new tokens cannot repeat

    def banned(ids: Sequence[int]) -> np.ndarray | None:
        return _vector(vocab_size, [((i,), -np.inf) for i in ids]) if ids else None

    return Processors(
        bias=_vector(vocab_size, biases) if any(len(ids) == 1 for ids, _ in biases) else None,
        sequence_bias=_sequences(biases),
        repetition_penalty=_unless(config.repetition_penalty, 1),
        penalties=penalties if any(map(np.any, penalties)) else None,
        no_repeat_ngram_size=_int(ngram_size) if 0 < ngram_size < prompt_width + max_new_tokens else None,
        bad_words=_sequences(bad_words),
        bad_tokens=banned([word[0] for word, _ in bad_words if len(word) == 1]),
        min_new_tokens=_int(min_new_tokens) if min_new_tokens > 0 and eos else None,
        forced_eos=forced,
        last_step=None if forced is None else _int(max_new_tokens - 1),
        length_penalty=LengthPenalty(_int(penalty[0]), _float(penalty[1])) if penalty and eos else None,
        suppressed=banned(config.suppress_tokens),
        suppressed_first=banned(config.begin_suppress_tokens),
    )


def _float(value: float) -> np.ndarray:
    """Returns a value that all rows share, as the programs take it."""
    return np.array([value], np.float32)


def _int(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def _unless(value: float | None, off: float) -> np.ndarray | None:
    return None if value is None or value == off else _float(value)


def _vector(size: int, biases: Sequence[tuple[tuple[int, ...], float]], fill: float = 0.0) -> np.ndarray:
    """Returns a value for each token (1, V): the sum of the biases of sequences of this one token, else `fill`."""
    vector = np.full(size, fill, np.float32)
    for ids, bias in biases:
        if len(ids) == 1:
            vector[ids[0]] = (0 if fill else vector[ids[0]]) + bias
    return vector[None]


def _sequences(biases: Sequence[tuple[tuple[int, ...], float]]) -> Sequences | None:
    """Returns the biases of sequences of at least two tokens, in arrays whose sizes are powers of two."""
    longer = [(ids, bias) for ids, bias in biases if len(ids) > 1]
    if not longer:
        return None
    width = 1 << (max(len(ids) for ids, _ in longer) - 1).bit_length()
    height = 1 << (len(longer) - 1).bit_length()
    reversed_ids = np.full((height, width), -1, np.int32)
    lengths, values = np.zeros(height, np.int32), np.zeros(height, np.float32)
    for i, (ids, bias) in enumerate(longer):
        reversed_ids[i, : len(ids)], lengths[i], values[i] = ids[::-1], len(ids), bias
    return Sequences(reversed_ids[None], lengths[None], values[None])


def _check_vocabulary(config: GenerationConfig, vocab_size: int) -> None:
    """Raises GenerationError for ids outside the vocabulary; as end of sequence they are only never generated."""
    used: Mapping[str, Callable[[], Any]] = {
        "logit_bias": lambda: config.logit_bias or (),
        "sequence_bias": lambda: [i for ids in config.sequence_bias or () for i in ids],
        "bad_words_ids": lambda: [i for ids in config.bad_words_ids for i in ids],
        "suppress_tokens": lambda: config.suppress_tokens,
        "begin_suppress_tokens": lambda: config.begin_suppress_tokens,
        "forced_eos_token_id": lambda: config.forced_eos_token_id,
    }
    for name, ids in used.items():
        if (largest := max(ids(), default=0)) >= vocab_size:
            raise GenerationError(f"{name}: expected ids below {vocab_size} (the model's vocabulary), got {largest}")


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int] | int | None:
    """Checks a seed for all rows, or one for each.

    Raises:
      GenerationError: there is not a seed for each row, or it is out of range.
    """
    if seed is None:
        return None
    seeds = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != rows and not isinstance(seed, int | np.integer):
        raise GenerationError(f"seed: expected one for each of {rows} rows, got {len(seeds)}")
    if not all(isinstance(s, int | np.integer) and 0 <= s < 1 << 32 for s in seeds):
        raise GenerationError(f"seed: expected whole numbers from 0 to {(1 << 32) - 1}, got {seed!r:.60}")
    return int(seeds[0]) if isinstance(seed, int | np.integer) else [int(s) for s in seeds]


def make_keys(seed: int | list[int] | None, rows: int, partition: Partition) -> np.ndarray:
    """Returns random keys (B, 2): of each row's own seed, or of one seed (None draws one) with the row's number."""
    if seed is None:
        seed = same_on_all_processes(partition, secrets.randbits(32))
    if isinstance(seed, list):
        return np.asarray(row_keys(np.array(seed, np.uint32), None))
    return np.asarray(row_keys(np.full(rows, seed, np.uint32), np.arange(rows, dtype=np.uint32)))
