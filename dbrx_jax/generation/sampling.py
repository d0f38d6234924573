"""Samples the next token from logits, which on a mesh stay split over the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt32

from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, VOCAB_BLOCK, Partition


class Sampling(NamedTuple):
    """Sampling parameters: float32 scalars, and arguments of the programs, so that changing one compiles nothing anew.

    Values without effect: temperature 1, top_k the vocabulary's size, top_p 1, min_p 0, repetition_penalty 1.
    """

    temperature: ArrayLike
    top_k: ArrayLike  # int32
    top_p: ArrayLike
    min_p: ArrayLike
    repetition_penalty: ArrayLike


def sample_tokens(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: UInt32[Array, "B 2"] | None,
    positions: Int[Array, "B"],
    sampling: Sampling,
    filtered: bool,
    partition: Partition = ONE_DEVICE,
) -> Int[Array, "B"]:
    """Samples the next token of each row.

    Args:
      logits: float32, as the model gives them; on a mesh, this device's shard of the vocabulary.
      seen: tokens already in the row, including the prompt; on a mesh likewise.
      keys: each row's random key; None takes the most probable token, and the lowest id of equal ones.
      positions: of the sampled tokens. The random numbers depend on key, position and token alone.
      filtered: whether top-k, top-p or min-p is in use.
    """
    penalty = sampling.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        return argmax(logits, partition)
    logits = logits / sampling.temperature
    if filtered:
        logits = jnp.where(logits >= _threshold(logits, sampling, partition), logits, -jnp.inf)
    size = logits.shape[1]
    first_block = partition.axis_index(*VOCAB_AXES) * (size // VOCAB_BLOCK)
    blocks = first_block + jnp.arange(-(-size // VOCAB_BLOCK))

    def noise(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        draw = jax.vmap(lambda block: jax.random.gumbel(jax.random.fold_in(key, block), (VOCAB_BLOCK,)))
        return draw(blocks).reshape(-1)[:size]

    return argmax(logits + jax.vmap(noise)(keys, positions), partition)


def argmax(logits: Float[Array, "B V"], partition: Partition = ONE_DEVICE) -> Int[Array, "B"]:
    """Returns the id of each row's largest logit, the lowest of equal ones."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if partition.size(*VOCAB_AXES) == 1:
        return best
    value = jnp.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    first_id = partition.axis_index(*VOCAB_AXES) * logits.shape[1]
    candidate = jnp.where(value == partition.pmax(value, *VOCAB_AXES), first_id + best, jnp.iinfo(jnp.int32).max)
    return -partition.pmax(-candidate, *VOCAB_AXES)


def _threshold(logits: Float[Array, "B V"], sampling: Sampling, partition: Partition) -> Float[Array, "B 1"]:
    """Returns the least logit that remains after top-k, then top-p (Holtzman et al. 2019, arXiv:1904.09751) and
    then min-p (Nguyen et al. 2024, arXiv:2407.01082). Equal logits are kept or dropped together.

    A binary search over float32 numbers: sorting takes longer, and needs the whole vocabulary on one device.
    """
    batch = logits.shape[0]

    def reaches_top_k(threshold: Array) -> Array:
        """Returns whether at least top_k logits are not below the threshold."""
        count = (logits >= threshold[:, None]).sum(axis=-1, dtype=jnp.int32)
        return partition.psum(count, *VOCAB_AXES) >= sampling.top_k

    largest = partition.pmax(logits.max(axis=-1), *VOCAB_AXES)[:, None]
    kth = _largest_float(reaches_top_k, batch)[:, None]
    weights = jnp.where(logits >= kth, jnp.exp(logits - largest), 0)
    total = partition.psum(weights.sum(axis=-1), *VOCAB_AXES)

    def is_below_top_p(threshold: Array) -> Array:
        """Returns whether the tokens above the threshold reach top_p on their own."""
        above = partition.psum(jnp.where(logits > threshold[:, None], weights, 0).sum(axis=-1), *VOCAB_AXES)
        return (above >= sampling.top_p * total) & jnp.less(sampling.top_p, 1)

    dropped = _largest_float(is_below_top_p, batch)[:, None]
    least = jnp.min(jnp.where(logits > dropped, logits, jnp.inf), axis=-1)
    # The most probable token is kept whatever top_p is.
    least = jnp.minimum(-partition.pmax(-least, *VOCAB_AXES)[:, None], largest)
    return jnp.maximum(jnp.maximum(kth, least), largest + jnp.log(sampling.min_p))


def _largest_float(condition: Callable[[Array], Array], rows: int) -> Float[Array, "B"]:
    """Returns each row's largest float32 that meets a condition, or the least float32 if none does.

    A binary search over the bits of the index of :func:`_nth_float`.

    Args:
      condition: true up to some number and false above it.
    """

    def set_bit(i: Array, prefix: Array) -> Array:
        candidate = prefix | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(condition(_nth_float(candidate)), candidate, prefix)

    return _nth_float(lax.fori_loop(0, 32, set_bit, jnp.zeros(rows, jnp.uint32)))


def _nth_float(index: Array) -> Array:
    """Returns the float32 at an index in ascending order of all float32 numbers; NaNs become infinite."""
    is_positive = index >> 31
    bits = jnp.where(is_positive, index ^ jnp.uint32(1 << 31), ~index)
    value = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), jnp.where(is_positive, jnp.inf, -jnp.inf), value)


@jax.jit
def row_keys(seeds: Int[Array, "B"], rows: Int[Array, "B"] | None) -> UInt32[Array, "B 2"]:
    """Returns each row's random key: that of its seed, folded with its row number if `rows` are given."""
    keys = jax.vmap(jax.random.key)(seeds)
    if rows is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, rows)
    return jax.random.key_data(keys)
