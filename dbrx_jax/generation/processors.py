"""Logits processors: biases, penalties, bans and forced tokens, applied before sampling.

They agree with the logits processors of transformers 4.57 and apply in its order. `frequency_penalty`,
`presence_penalty` and `logit_bias` are OpenAI's: the bias comes first, the penalties follow the repetition penalty, as
in vLLM. On a mesh logits stay split over the vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.errors import GenerationError
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition

# Maps ids (B, S), the number of tokens in each row (B,) and logits (B, V) to logits; all are JAX arrays.
LogitsFunction: TypeAlias = Callable[[Array, Array, Array], Array]


class Sequences(NamedTuple):
    """Token sequences with a bias for the last token where a row ends with the tokens before it."""

    reversed_ids: Int[ArrayLike, "W L"]  # the last token first, -1 behind the first
    lengths: Int[ArrayLike, "W"]  # at least 2; 0 for padding
    bias: Float[ArrayLike, "W"]


class CountPenalties(NamedTuple):
    """Penalties of tokens that have been generated: for each time, and once."""

    frequency: ArrayLike
    presence: ArrayLike


class LengthPenalty(NamedTuple):
    """Exponential growth of the end-of-sequence logits after `start` new tokens."""

    start: ArrayLike  # int32
    factor: ArrayLike


class Processors(NamedTuple):
    """Logits processors in the order in which they apply; None is off and adds nothing to the programs.

    Vectors have an entry for each token of the (padded) vocabulary.
    """

    bias: Float[ArrayLike, "V"] | None = None
    sequence_bias: Sequences | None = None
    repetition_penalty: ArrayLike | None = None
    penalties: CountPenalties | None = None
    no_repeat_ngram_size: ArrayLike | None = None  # int32
    bad_words: Sequences | None = None
    bad_tokens: Float[ArrayLike, "V"] | None = None  # bad words of one token: -inf
    min_new_tokens: ArrayLike | None = None  # int32
    forced_eos: Float[ArrayLike, "V"] | None = None  # logits of the last token
    last_step: ArrayLike | None = None  # int32; with forced_eos
    length_penalty: LengthPenalty | None = None
    suppressed: Float[ArrayLike, "V"] | None = None  # -inf
    suppressed_first: Float[ArrayLike, "V"] | None = None  # -inf for the first new token


VECTORS = ("bias", "bad_tokens", "forced_eos", "suppressed", "suppressed_first")  # fields with an entry for each token


class Rows(NamedTuple):
    """State of B rows for the processors; None where no processor needs it."""

    tokens: Int[Array, "B S"]  # of the prompt and new ones
    lengths: Int[Array, "B"]  # their number
    seen: Bool[Array, "B V"] | None  # tokens in the row, for the repetition penalty
    counts: Int[Array, "B V"] | None  # number of each among the new tokens, for the other two penalties


def processor_specs(processors: Processors, partition: Partition) -> Any:
    """Returns the partition specs of the arrays: vectors are split over the vocabulary."""
    specs = jax.tree.map(lambda _: partition.array_spec(), processors)
    vectors = {name: partition.array_spec(VOCAB_AXES) for name in VECTORS if getattr(processors, name) is not None}
    return specs._replace(**vectors)


def process_logits(
    logits: Float[Array, "B V"],
    processors: Processors,
    rows: Rows,
    eos: Int[Array, "E"],
    step: Int[Array, ""],
    partition: Partition,
) -> Float[Array, "B V"]:
    """Applies all processors that are on.

    Args:
      logits: float32, as the model gives them; on a mesh, this device's shard of the vocabulary.
      eos: end-of-sequence ids, -1 for padding.
      step: number of new tokens so far.
    """
    p = processors
    if p.bias is not None:
        logits = logits + p.bias
    if p.sequence_bias is not None:
        logits = _add_sequence_bias(logits, p.sequence_bias, rows, partition)
    if p.repetition_penalty is not None and rows.seen is not None:
        penalised = jnp.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
        logits = jnp.where(rows.seen, penalised, logits)
    if p.penalties is not None and rows.counts is not None:
        logits = logits - p.penalties.frequency * rows.counts - p.penalties.presence * (rows.counts > 0)
    if p.no_repeat_ngram_size is not None:
        logits = _ban_repeated_ngrams(logits, p.no_repeat_ngram_size, rows, partition)
    if p.bad_words is not None:
        logits = _add_sequence_bias(logits, p.bad_words, rows, partition)
    if p.bad_tokens is not None:
        logits = logits + p.bad_tokens
    is_eos = token_mask(eos, logits.shape[1], partition)
    if p.min_new_tokens is not None:
        logits = jnp.where(is_eos & (step < p.min_new_tokens), -jnp.inf, logits)
    if p.forced_eos is not None:
        logits = jnp.where(step == p.last_step, p.forced_eos, logits)
    if p.length_penalty is not None:
        growth = jnp.power(p.length_penalty.factor, (step - p.length_penalty.start).astype(jnp.float32)) - 1
        is_penalised = is_eos & (step > p.length_penalty.start) & jnp.isfinite(logits)
        logits = jnp.where(is_penalised, logits + jnp.abs(logits) * growth, logits)
    if p.suppressed is not None:
        logits = logits + p.suppressed
    if p.suppressed_first is not None:
        logits = jnp.where(step == 0, logits + p.suppressed_first, logits)
    return logits


def apply_functions(
    logits: Float[Array, "B V"],
    functions: tuple[LogitsFunction, ...],
    rows: Rows,
    vocab_size: int,
    partition: Partition,
) -> Float[Array, "B V"]:
    """Applies the caller's functions, which see the whole vocabulary without its padding.

    Raises:
      GenerationError: a function returns an array of another shape.
    """
    if not functions:
        return logits
    shard_size = logits.shape[1]
    full = partition.all_gather(logits, 1, *VOCAB_AXES)
    padding = full[:, vocab_size:]
    full = full[:, :vocab_size]
    for function in functions:
        shape, full = full.shape, jnp.asarray(function(rows.tokens, rows.lengths, full))
        if full.shape != shape:
            name = getattr(function, "__name__", type(function).__name__)
            raise GenerationError(f"logits_processor: {name}: expected logits {shape}, got {full.shape}")
    full = jnp.concatenate([full, padding], axis=1)
    return lax.dynamic_slice_in_dim(full, partition.axis_index(*VOCAB_AXES) * shard_size, shard_size, axis=1)


def local_ids(tokens: Int[Array, "*shape"], shard_size: int, partition: Partition) -> Int[Array, "*shape"]:
    """Returns the indices of tokens in this device's shard of the vocabulary; `shard_size` for those not in it."""
    ids = tokens - partition.axis_index(*VOCAB_AXES) * shard_size
    return jnp.where((ids >= 0) & (ids < shard_size) & (tokens >= 0), ids, shard_size)


def token_mask(tokens: Int[Array, "N"], shard_size: int, partition: Partition) -> Bool[Array, "V"]:
    """Marks tokens in this device's shard of the vocabulary; negative ones are none."""
    return jnp.zeros(shard_size, bool).at[local_ids(tokens, shard_size, partition)].set(True, mode="drop")


def _add_sequence_bias(logits: Array, sequences: Sequences, rows: Rows, partition: Partition) -> Array:
    """Adds the bias of each sequence to its last token where a row ends with its other tokens."""
    reversed_ids, lengths = jnp.asarray(sequences.reversed_ids), jnp.asarray(sequences.lengths)
    depth = jnp.arange(1, reversed_ids.shape[1])  # of a token before the sequence's last one
    indices = jnp.maximum(rows.lengths[:, None] - depth, 0)
    endings = jnp.take_along_axis(rows.tokens, indices, axis=1)  # (B, L - 1), the last token first
    is_equal = endings[:, None] == reversed_ids[None, :, 1:]
    is_match = jnp.all(is_equal | (depth >= lengths[:, None]), axis=-1)  # (B, W)
    is_match &= (lengths > 0) & (lengths <= rows.lengths[:, None])
    last = local_ids(reversed_ids[:, 0], logits.shape[1], partition)
    return logits.at[:, last].add(jnp.where(is_match, sequences.bias, 0), mode="drop")


def _ban_repeated_ngrams(logits: Array, size: ArrayLike, rows: Rows, partition: Partition) -> Array:
    """Gives -inf to tokens that would complete an n-gram of `size` tokens that is in the row already."""
    tokens, lengths = rows.tokens, rows.lengths[:, None]
    starts = jnp.arange(tokens.shape[1])

    def compare(i: Array, is_match: Array) -> Array:
        """Compares token i of the n-gram that begins at each position with token i of the one to complete."""
        wanted = jnp.take_along_axis(tokens, jnp.maximum(lengths - size + 1 + i, 0), axis=1)
        return is_match & (jnp.roll(tokens, -i, axis=1) == wanted)

    is_match = lax.fori_loop(0, size - 1, compare, (starts + size <= lengths))
    completing = local_ids(jnp.roll(tokens, 1 - size, axis=1), logits.shape[1], partition)
    completing = jnp.where(is_match, completing, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], completing].set(-jnp.inf, mode="drop")
