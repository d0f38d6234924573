"""Logits processors: biases, penalties, bans and forced tokens, applied before sampling.

They agree with the logits processors of transformers 4.57 and apply in its order. `frequency_penalty`,
`presence_penalty` and `logit_bias` are OpenAI's: the bias comes first, the penalties follow the repetition penalty, as
in vLLM. On a mesh logits stay split over the vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt32

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.rows import take_rows
from dbrx_jax.generation.token_mask import apply_mask
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition

# Maps ids (B, S), the number of tokens in each row (B,) and logits (B, V) to logits; all are JAX arrays.
LogitsFunction: TypeAlias = Callable[[Array, Array, Array], Array]


class Sequences(NamedTuple):
    """Token sequences with a bias for the last token where a row ends with the tokens before it."""

    reversed_ids: Int[ArrayLike, "M W L"]  # the last token first, -1 behind the first
    lengths: Int[ArrayLike, "M W"]  # at least 2; 0 for padding
    bias: Float[ArrayLike, "M W"]


class CountPenalties(NamedTuple):
    """Penalties of tokens that have been generated: for each time, and once."""

    frequency: Float[ArrayLike, "M"]
    presence: Float[ArrayLike, "M"]


class LengthPenalty(NamedTuple):
    """Exponential growth of the end-of-sequence logits after `start` new tokens."""

    start: Int[ArrayLike, "M"]
    factor: Float[ArrayLike, "M"]


class Processors(NamedTuple):
    """Logits processors in the order in which they apply; None is off and adds nothing to the programs.

    Each array has a dimension of M slots in front, or of 1 if all rows share a value. Those of VECTORS have an entry
    for each token of the (padded) vocabulary.
    """

    bias: Float[ArrayLike, "M V"] | None = None
    sequence_bias: Sequences | None = None
    repetition_penalty: Float[ArrayLike, "M"] | None = None
    penalties: CountPenalties | None = None
    no_repeat_ngram_size: Int[ArrayLike, "M"] | None = None
    bad_words: Sequences | None = None
    bad_tokens: Float[ArrayLike, "M V"] | None = None  # bad words of one token: -inf
    min_new_tokens: Int[ArrayLike, "M"] | None = None
    forced_eos: Float[ArrayLike, "M V"] | None = None  # logits of the last token
    last_step: Int[ArrayLike, "M"] | None = None  # with forced_eos
    length_penalty: LengthPenalty | None = None
    suppressed: Float[ArrayLike, "M V"] | None = None  # -inf
    suppressed_first: Float[ArrayLike, "M V"] | None = None  # -inf for the first new token
    allowed: UInt32[ArrayLike, "M W"] | None = None  # a bit for each token that may come next
    # Processors that a row uses, a bit for each by its index here. One that no row of a step uses is not computed. None
    # computes all that are not None.
    used: Int[ArrayLike, "M"] | None = None


VECTORS = ("bias", "bad_tokens", "forced_eos", "suppressed", "suppressed_first")  # fields with an entry for each token


class Rows(NamedTuple):
    """State of R rows for the processors; None where no processor needs it."""

    slots: Int[Array, "R"]  # their numbers among the M slots of other arrays
    lengths: Int[Array, "R"]  # number of their tokens
    step: Int[Array, "R"]  # number of new tokens so far
    tokens: Int[Array, "M S"]  # of the prompt and new ones
    seen: Bool[Array, "M V"] | None  # tokens in the row, for the repetition penalty
    counts: Int[Array, "M V"] | None  # number of each among the new tokens, for the other two penalties


def processor_specs(processors: Processors, partition: Partition) -> Any:
    """Returns the partition specs of the arrays: vectors are split over the vocabulary."""
    specs = jax.tree.map(lambda _: partition.array_spec(), processors)
    vector = partition.array_spec(None, VOCAB_AXES)
    vectors = {name: vector for name in VECTORS if getattr(processors, name) is not None}
    return specs._replace(**vectors)


def process_logits(
    logits: Float[Array, "R V"], processors: Processors, rows: Rows, eos: Int[Array, "M E"], partition: Partition
) -> Float[Array, "R V"]:
    """Applies all processors that are on.

    Args:
      logits: float32, as the model gives them; on a mesh, this device's shard of the vocabulary.
      eos: end-of-sequence ids, -1 for padding.
    """
    used = None if processors.used is None else take_rows(processors.used, rows.slots)

    def process(logits: Array) -> Array:
        for name, function in _PROCESSORS.items():
            parameters = getattr(processors, name)
            if parameters is None:
                continue
            run = partial(
                function, parameters=parameters, processors=processors, rows=rows, eos=eos, partition=partition
            )
            is_used = None if used is None else used >> Processors._fields.index(name)
            logits = run(logits) if is_used is None else _run_where_used(run, is_used, logits)
        return logits

    if used is None:
        return process(logits)
    # One condition around those of each processor: the host of a GPU waits for every one.
    return lax.cond((used != 0).any(), process, lambda logits: logits, logits)


def _run_where_used(run: Callable[[Array], Array], used: Int[Array, "R"], logits: Float[Array, "R V"]) -> Array:
    """Applies a processor to the rows whose lowest bit of `used` is 1; to none of them at no cost."""
    is_used = (used & 1) > 0

    def run_some(logits: Array) -> Array:
        return jnp.where(is_used[:, None], run(logits), logits)

    return lax.cond(is_used.any(), run_some, lambda logits: logits, logits)


def _column(array: ArrayLike, rows: Rows) -> Array:
    """Returns a value of each row, or one for all, as (R, 1) or (1, 1)."""
    return take_rows(array, rows.slots)[:, None]


def _add(logits, parameters, processors, rows, eos, partition):
    return logits + take_rows(parameters, rows.slots)


def _penalize_repetition(logits, parameters, processors, rows, eos, partition):
    penalty = _column(parameters, rows)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(take_rows(rows.seen, rows.slots), penalised, logits)


def _penalize_counts(logits, parameters, processors, rows, eos, partition):
    counts = take_rows(rows.counts, rows.slots)
    logits = logits - _column(parameters.frequency, rows) * counts
    return logits - _column(parameters.presence, rows) * (counts > 0)


def _ban_end(logits, parameters, processors, rows, eos, partition):
    is_early = rows.step[:, None] < _column(parameters, rows)
    return jnp.where(_is_eos(logits, rows, eos, partition) & is_early, -jnp.inf, logits)


def _force_end(logits, parameters, processors, rows, eos, partition):
    is_last = rows.step[:, None] == _column(processors.last_step, rows)
    return jnp.where(is_last, take_rows(parameters, rows.slots), logits)


def _favour_end(logits, parameters, processors, rows, eos, partition):
    start, step = _column(parameters.start, rows), rows.step[:, None]
    growth = jnp.power(_column(parameters.factor, rows), (step - start).astype(jnp.float32)) - 1
    is_penalised = _is_eos(logits, rows, eos, partition) & (step > start) & jnp.isfinite(logits)
    return jnp.where(is_penalised, logits + jnp.abs(logits) * growth, logits)


def _suppress_first(logits, parameters, processors, rows, eos, partition):
    return jnp.where(rows.step[:, None] == 0, logits + take_rows(parameters, rows.slots), logits)


def _allow(logits, parameters, processors, rows, eos, partition):
    return apply_mask(logits, take_rows(parameters, rows.slots), partition)


def _is_eos(logits: Array, rows: Rows, eos: Array, partition: Partition) -> Bool[Array, "R V"]:
    """Marks the end-of-sequence ids in this device's shard of the vocabulary; negative ids are none."""
    ids = local_ids(take_rows(eos, rows.slots), logits.shape[1], partition)
    return jnp.zeros((len(ids), logits.shape[1]), bool).at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")


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
    shard_size, tokens = logits.shape[1], take_rows(rows.tokens, rows.slots)
    full = partition.all_gather(logits, 1, *VOCAB_AXES)
    padding = full[:, vocab_size:]
    full = full[:, :vocab_size]
    for function in functions:
        shape, full = full.shape, jnp.asarray(function(tokens, rows.lengths, full))
        if full.shape != shape:
            name = getattr(function, "__name__", type(function).__name__)
            raise GenerationError(f"logits_processor: {name}: expected logits {shape}, got {full.shape}")
    full = jnp.concatenate([full, padding], axis=1)
    return lax.dynamic_slice_in_dim(full, partition.axis_index(*VOCAB_AXES) * shard_size, shard_size, axis=1)


def local_ids(tokens: Int[Array, "*shape"], shard_size: int, partition: Partition) -> Int[Array, "*shape"]:
    """Returns the indices of tokens in this device's shard of the vocabulary; `shard_size` for those not in it."""
    ids = tokens - partition.axis_index(*VOCAB_AXES) * shard_size
    return jnp.where((ids >= 0) & (ids < shard_size) & (tokens >= 0), ids, shard_size)


def _add_sequence_bias(logits, parameters, processors, rows, eos, partition):
    """Adds the bias of each sequence to its last token where a row ends with its other tokens."""
    reversed_ids, lengths, bias = (take_rows(a, rows.slots) for a in parameters)
    tokens = take_rows(rows.tokens, rows.slots)
    depth = jnp.arange(1, reversed_ids.shape[2])  # of a token before the sequence's last one
    indices = jnp.maximum(rows.lengths[:, None] - depth, 0)
    endings = jnp.take_along_axis(tokens, indices, axis=1)  # (R, L - 1), the last token first
    is_equal = endings[:, None] == reversed_ids[:, :, 1:]
    is_match = jnp.all(is_equal | (depth >= lengths[..., None]), axis=-1)  # (R, W)
    is_match &= (lengths > 0) & (lengths <= rows.lengths[:, None])
    last = jnp.broadcast_to(local_ids(reversed_ids[:, :, 0], logits.shape[1], partition), is_match.shape)
    return logits.at[jnp.arange(len(last))[:, None], last].add(jnp.where(is_match, bias, 0), mode="drop")


def _ban_repeated_ngrams(logits, parameters, processors, rows, eos, partition):
    """Gives -inf to tokens that would complete an n-gram that is in the row already; a size of 0 bans none."""
    size = _column(parameters, rows)
    tokens, lengths = take_rows(rows.tokens, rows.slots), rows.lengths[:, None]
    last = tokens.shape[1] - 1
    starts = jnp.arange(tokens.shape[1])

    def compare(i: Array, is_match: Array) -> Array:
        """Compares token i of the n-gram that begins at each position with token i of the one to complete."""
        wanted = jnp.take_along_axis(tokens, jnp.clip(lengths - size + 1 + i, 0, last), axis=1)
        return is_match & ((jnp.roll(tokens, -i, axis=1) == wanted) | (i >= size - 1))

    is_match = lax.fori_loop(0, jnp.max(size) - 1, compare, (starts + size <= lengths) & (size > 0))
    completing = jnp.take_along_axis(tokens, jnp.clip(starts + size - 1, 0, last), axis=1)
    completing = jnp.where(is_match, local_ids(completing, logits.shape[1], partition), logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], completing].set(-jnp.inf, mode="drop")


# Functions of the logits (R, V), the field's parameters, and the other arguments of process_logits.
_PROCESSORS: dict[str, Callable[..., Array]] = {
    "bias": _add,
    "sequence_bias": _add_sequence_bias,
    "repetition_penalty": _penalize_repetition,
    "penalties": _penalize_counts,
    "no_repeat_ngram_size": _ban_repeated_ngrams,
    "bad_words": _add_sequence_bias,
    "bad_tokens": _add,
    "min_new_tokens": _ban_end,
    "forced_eos": _force_end,
    "length_penalty": _favour_end,
    "suppressed": _add,
    "suppressed_first": _suppress_first,
    "allowed": _allow,
}
