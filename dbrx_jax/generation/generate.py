"""Generation on the host: arguments, chunked prefill, bursts of decode steps, streaming and stops.

Prompts go through the model row by row in chunks of fixed lengths, without padding, so that few programs are compiled
and a row's numbers do not depend on the others. Then all rows decode together. On a mesh with several data-parallel
groups each group prefills one of its rows at a time.
"""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.decode import (
    MAX_EOS,
    DecodeState,
    Settings,
    decode,
    empty_cache,
    first_token,
    lower,
    prefill_chunk,
    replicate,
    same_on_all_processes,
    stop_rows,
)
from dbrx_jax.generation.sampling import Sampling, row_keys
from dbrx_jax.model.cache import cache_capacity, prefill_chunks
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model
from dbrx_jax.model.inputs import check_ids, same_shape
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.sharding.partition import BATCH_AXES, Partition
from dbrx_jax.text.tokenizer import DbrxTokenizer

BURST = 8  # decode steps between two transfers to the host, if tokens are streamed or searched for stop strings
MIN_TEMPERATURE = 1e-3  # logits divided by much less are infinite
_FROM_CHECKPOINT: Any = object()  # the default of an option in which None has a meaning


class GenerationOutput(NamedTuple):
    """The result of generate with return_dict_in_generate=True."""

    sequences: np.ndarray  # (B, T + N) int32
    logprobs: np.ndarray | None  # (B, N) float32, of the raw logits; NaN after a row's end


@dataclasses.dataclass
class Timings:
    """Seconds that a stream spent in each phase; `compile` is counted only if compile() was called."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


def generate(
    model: CausalLM,
    input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    streamer: Any = None,
    return_dict_in_generate: bool = False,
    output_logprobs: bool = False,
    **options: Any,
) -> np.ndarray | GenerationOutput:
    """Continues each prompt and returns the prompts as given with their new tokens: (B, T + N).

    N is the number of steps until the last row ended, at most max_new_tokens. A row keeps the token
    that ended it and is padded with the pad token after it.

    Args:
      streamer: a function that is called with new tokens (B, n) as they are generated, or an object with
        the methods put and end of transformers' streamers.
      return_dict_in_generate: return a :class:`GenerationOutput`.
      output_logprobs: with return_dict_in_generate, each token's log-probability under the raw logits.
      **options: see :class:`TokenStream`.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """
    stream = TokenStream(model, input_ids, attention_mask, burst=None if streamer is None else BURST, **options)
    put = getattr(streamer, "put", streamer)
    if hasattr(streamer, "put"):
        put(stream.prompt)
    for tokens in stream:
        if put is not None:
            put(tokens)
    if hasattr(streamer, "end"):
        streamer.end()
    if not return_dict_in_generate:
        return stream.sequences
    return GenerationOutput(stream.sequences, stream.logprobs if output_logprobs else None)


class TokenStream(Iterator[np.ndarray]):
    """Iterator over the new tokens of a batch as they are generated: arrays (B, n), n from 1 to `burst`.

    Args:
      model: the model.
      input_ids: prompts (B, T).
      attention_mask: 1 for tokens, 0 for padding, left or right; all ones by default.
      max_new_tokens: limit of new tokens in a row.
      do_sample: sample rather than take the most probable token; the next four options need it.
      temperature: logits are divided by it; above 0.
      top_k: keep the k most probable tokens.
      top_p: keep the most probable tokens that together reach this probability.
      min_p: keep tokens at least this fraction as probable as the most probable one.
      repetition_penalty: above 1 makes tokens already in the row less probable.
      seed: row i samples with fold_in(seed, i); a list gives each row its own seed; None draws a new seed.
      eos_token_id: id or ids that end a row; the checkpoint's by default, None never stops.
      pad_token_id: fills ended rows; by default the checkpoint's, else the first eos, else 0.
      stop_strings: a row ends with the token that completes one of these in its new text.
      tokenizer: needed for stop_strings.
      burst: limit of tokens in a step of the iterator; None is BURST with stop_strings, else no limit.
      cache_length: minimum of the cache's positions; calls with the same number share compiled programs.
      cache_dtype: "int8" halves a bfloat16 cache, with a scale for each position and head; None is the model's.
      batch_invariant: bit for bit the same tokens and log-probabilities of a row in a batch of any size; see
        docs/batch-invariance.md for its cost.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """

    def __init__(
        self,
        model: CausalLM,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = _FROM_CHECKPOINT,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: DbrxTokenizer | None = None,
        burst: int | None = BURST,
        cache_length: int | None = None,
        cache_dtype: Literal["int8"] | None = None,
        batch_invariant: bool = False,
    ):
        self.prompt, self._rows = _unpadded(model, input_ids, attention_mask)
        num_rows, longest = len(self._rows), max(map(len, self._rows))
        _check_positive("max_new_tokens", max_new_tokens, integer=True)
        if longest + max_new_tokens > model.config.max_seq_len:
            available = model.config.max_seq_len - longest
            raise GenerationError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens is beyond the model's "
                f"{model.config.max_seq_len} positions; "
                + (f"ask for at most {available}" if available > 0 else "shorten the prompt")
            )
        if burst is not None:
            _check_positive("burst", burst, integer=True)
        self._eos = _eos_ids(model, eos_token_id)
        self.pad_token_id = _pad_id(model, pad_token_id, self._eos)
        self._stop_searches = None
        if stop_strings:
            if tokenizer is None:
                raise GenerationError("stop_strings: needs tokenizer=, to know the text of the tokens")
            strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
            self._stop_searches = [_StopSearch(tokenizer, strings) for _ in self._rows]
        self._max_new_tokens = max_new_tokens
        self._burst = min(burst or (BURST if self._stop_searches else max_new_tokens), max_new_tokens)
        self._filtered = do_sample and any(f is not None for f in (top_k, top_p, min_p))
        sampling = _make_sampling(model.config.vocab_size, temperature, top_k, top_p, min_p, repetition_penalty)
        self._config, self._partition, self._model_state = model.config, model.partition, split_model(model)
        self._num_groups = self._partition.size(*BATCH_AXES)
        if cache_dtype not in (None, "int8"):
            raise GenerationError(f"cache_dtype: expected int8 or None, got {cache_dtype!r:.40}")
        self._cache_dtype = model.dtype if cache_dtype is None else np.dtype(cache_dtype)
        self._batch_invariant = batch_invariant
        self._padding_rows = -num_rows % (self._num_groups * (ROW_TILE if batch_invariant else 1))
        seeds, row_numbers = _seeds(seed, num_rows, self._partition)
        keys: Any = None
        if do_sample:
            keys = np.pad(np.asarray(row_keys(seeds, row_numbers)), ((0, self._padding_rows), (0, 0)))
        padded_eos = np.array(self._eos + [-1] * (MAX_EOS - len(self._eos)), np.int32)
        self._settings = Settings(sampling, keys, padded_eos)
        self._lengths = np.zeros(num_rows, np.int32)  # new tokens of each row so far
        self._ended = np.zeros(num_rows, bool)
        self._steps = 0
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and log-probabilities of each burst
        self._state: DecodeState | None = None
        self.timings = Timings()
        self._positions = cache_capacity(max(longest + max_new_tokens, cache_length or 0), self._partition)

    def lowered(self) -> Iterator[tuple[str, Any]]:
        """Yields the programs that this stream will run, by name; each is traced when it is needed, not compiled."""
        return lower(
            self._model_state,
            self._settings,
            self._filtered,
            self._batch_invariant,
            len(self._rows) + self._padding_rows,
            self._positions,
            self._cache_dtype,
            sorted({length for ids in self._rows for _, length in prefill_chunks(len(ids), self._partition)}),
        )

    def compile(self) -> None:
        """Compiles the programs that this stream will run, each while the next is traced; else the first steps do.

        A second stream of the same shapes has nothing left to compile.
        """
        begin = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            for compiled in [pool.submit(program.compile) for _, program in self.lowered()]:
                compiled.result()
        self.timings.compile += time.perf_counter() - begin

    def __next__(self) -> np.ndarray:
        if self._steps == self._max_new_tokens or self._ended.all():
            raise StopIteration
        begin = time.perf_counter()
        if self._state is None:
            self._state = self._prefill()
            tokens = self._collect(self._state)
            self.timings.prefill += time.perf_counter() - begin
        else:
            steps = np.int32(min(self._burst, self._max_new_tokens - self._steps))
            self._state = decode(
                self._model_state, self._filtered, self._batch_invariant, self._settings, self._state, steps
            )
            tokens = self._collect(self._state)
            self.timings.decode += time.perf_counter() - begin
        return tokens

    def _prefill(self) -> DecodeState:
        """Runs the model on all prompts and samples each row's first token."""
        rows = [*self._rows, *[np.zeros(0, np.int32)] * self._padding_rows]
        cache, logits = empty_cache(self._config, self._partition, len(rows), self._positions, self._cache_dtype)
        rows_per_group = len(rows) // self._num_groups
        for row in range(rows_per_group):
            group_prompts = rows[row::rows_per_group]  # one of each group
            plans = [prefill_chunks(len(ids), self._partition) for ids in group_prompts]
            for chunks in itertools.zip_longest(*plans, fillvalue=(0, 0)):
                # A prompt's chunks depend on its own length alone; groups with chunks of another length wait.
                for length in sorted({n for _, n in chunks if n}):
                    parts = [
                        ids[start : start + n] if n == length else ids[:0]
                        for ids, (start, n) in zip(group_prompts, chunks, strict=True)
                    ]
                    tokens = np.stack([np.pad(part, (0, length - len(part))) for part in parts])
                    starts = [start if len(part) else 0 for part, (start, _) in zip(parts, chunks, strict=True)]
                    spans = np.array([[row, s, len(p)] for s, p in zip(starts, parts, strict=True)], np.int32)
                    cache, logits = prefill_chunk(self._model_state, cache, logits, tokens, spans)
        prompts = np.stack([np.pad(ids, (0, self._positions - len(ids))) for ids in rows])
        lengths = np.array([max(1, len(ids)) for ids in rows], np.int32)
        done = np.array([not len(ids) for ids in rows])
        options = (self._config, self._partition, self._filtered, self._batch_invariant, self._settings)
        return first_token(*options, cache, logits, prompts, lengths, done)

    def _collect(self, state: DecodeState) -> np.ndarray:
        """Returns the tokens since the last call (B, n), and ends rows in which a stop string was completed."""
        start, stop = self._steps, int(state.step)
        arrays = [state.tokens, state.logprobs]
        if self._num_groups > 1:
            arrays = replicate(self._partition, arrays)
        tokens, logprobs = (np.array(np.asarray(a)[: len(self._rows), start:stop]) for a in arrays)
        stopped = np.zeros(len(tokens), bool)
        for row in np.flatnonzero(~self._ended):
            length = next((i + 1 for i, t in enumerate(tokens[row]) if t in self._eos), None)
            if self._stop_searches is not None:
                stop_length = self._stop_searches[row].push(tokens[row][:length])
                stopped[row] = stop_length is not None
                length = stop_length or length
            self._lengths[row] += stop - start if length is None else length
            self._ended[row] = length is not None
        is_padding = np.arange(start, stop) >= self._lengths[:, None]
        tokens[is_padding], logprobs[is_padding] = self.pad_token_id, np.nan
        if stopped.any():
            done, running = stop_rows(self._partition, state.done, np.pad(stopped, (0, self._padding_rows)))
            self._state = state._replace(done=done, running=running)
        self._steps = stop
        num_tokens = max(1, int(self._lengths.max()) - start)  # fewer if stop strings ended the last rows
        self._chunks.append((tokens[:, :num_tokens], logprobs[:, :num_tokens]))
        return tokens[:, :num_tokens]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Number of tokens of each prompt (B,), without padding."""
        return np.array([len(ids) for ids in self._rows])

    @property
    def lengths(self) -> np.ndarray:
        """Number of new tokens of each row so far (B,), including the one that ended it."""
        return self._lengths.copy()

    @property
    def ended(self) -> np.ndarray:
        """Rows that a token or a stop string has ended (B,), bool; the others end at max_new_tokens."""
        return self._ended.copy()

    @property
    def sequences(self) -> np.ndarray:
        """The prompts as given and all tokens so far, (B, T + N) int32."""
        return np.concatenate([self.prompt, *(tokens for tokens, _ in self._chunks)], axis=1)

    @property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities of all new tokens so far under the raw logits, (B, N); NaN after a row's end."""
        return np.concatenate([np.zeros((len(self.prompt), 0), np.float32), *(p for _, p in self._chunks)], axis=1)


class _StopSearch:
    """Searches one row's text for stop strings as it grows."""

    def __init__(self, tokenizer: DbrxTokenizer, strings: list[str]):
        if not all(isinstance(s, str) and s for s in strings):
            raise GenerationError(f"stop_strings: expected texts that are not empty, got {strings!r}")
        self._tokenizer = tokenizer
        self._strings = [s.encode() for s in strings]
        self._tail = b""  # the end of the text so far, in which a stop string may begin
        self._max_tail = max(map(len, self._strings)) - 1

    def push(self, tokens: np.ndarray) -> int | None:
        """Returns the number of these tokens that complete a stop string, or None."""
        for count, token in enumerate(tokens, 1):
            text = self._tail + self._tokenizer.token_bytes(int(token), skip_special_tokens=True)
            if any(s in text for s in self._strings):
                return count
            self._tail = text[max(0, len(text) - self._max_tail) :]
        return None


def _unpadded(model, input_ids, attention_mask) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompts as given (B, T), and each row's tokens without padding."""
    ids = np.asarray(check_ids(input_ids, model.config.vocab_size), np.int32)
    if attention_mask is None:
        return ids, list(ids)
    mask = np.asarray(same_shape("attention_mask", attention_mask, ids)) != 0
    rows = [row[is_token] for row, is_token in zip(ids, mask, strict=True)]
    for index, row in enumerate(rows):
        if not len(row):
            raise GenerationError(f"attention_mask: row {index} has no token; a prompt needs at least one")
    return ids, rows


def _eos_ids(model, value: Any) -> list[int]:
    if value is _FROM_CHECKPOINT:
        value = model.generation_config.eos_token_ids
    ids = [] if value is None else list(value) if isinstance(value, Sequence) else [value]
    if len(ids) > MAX_EOS:
        raise GenerationError(f"eos_token_id: at most {MAX_EOS} ids, got {len(ids)}")
    return [_token_id("eos_token_id", i) for i in ids]


def _pad_id(model, value: int | None, eos: list[int]) -> int:
    candidates = (value, model.generation_config.pad_token_id, *eos, 0)
    return _token_id("pad_token_id", next(c for c in candidates if c is not None))


def _token_id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 1 << 31:
        raise GenerationError(f"{name}: expected a token id, got {value!r:.40}")
    return int(value)


def _make_sampling(vocab_size, temperature, top_k, top_p, min_p, repetition_penalty) -> Sampling:
    """Checks the sampling options, and replaces None by the value that turns an option off."""
    _check_positive("temperature", temperature)
    if temperature < MIN_TEMPERATURE:
        raise GenerationError(
            f"temperature: expected at least {MIN_TEMPERATURE}, got {temperature}; or do_sample=False"
        )
    _check_positive("repetition_penalty", repetition_penalty)
    if top_k is not None:
        _check_positive("top_k", top_k, integer=True)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not (isinstance(value, int | float | np.floating) and 0 <= value <= 1):
            raise GenerationError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return Sampling(
        np.float32(temperature),
        np.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
        np.float32(1 if top_p is None else top_p),
        np.float32(0 if min_p is None else min_p),
        np.float32(repetition_penalty),
    )


def _check_positive(name: str, value: Any, integer: bool = False) -> None:
    types = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < float("inf"):
        raise GenerationError(f"{name}: expected a {'whole ' if integer else ''}number above 0, got {value!r}")


def _seeds(seed: int | Sequence[int] | None, rows: int, partition: Partition) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns each row's seed, and the row numbers to fold in if all rows share one seed."""
    if seed is None:
        seed = same_on_all_processes(partition, secrets.randbits(32))
    seeds = [seed] * rows if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != rows:
        raise GenerationError(f"seed: expected one for each of {rows} rows, got {len(seeds)}")
    if not all(0 <= s < 1 << 32 for s in seeds):
        raise GenerationError(f"seed: expected whole numbers from 0 to {(1 << 32) - 1}, got {seed!r}")
    row_numbers = np.arange(rows, dtype=np.uint32) if isinstance(seed, int | np.integer) else None
    return np.array(seeds, np.uint32), row_numbers
