"""Sampling the next token from logits, which on a mesh stay split over the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt32

from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, VOCAB_BLOCK, Partition


class Sampling(NamedTuple):
    """The numbers of the processors, float32 scalars so that changing one compiles nothing anew.

    Values that switch a processor off: temperature 1, top_k the vocabulary's size, top_p 1, min_p 0,
    repetition_penalty 1.
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
    """The next token of each row.

    Args:
      logits: float32, as the model gives them; on a mesh, of this device's part of the vocabulary.
      seen: tokens already in the row, prompt included; on a mesh likewise.
      keys: each row's random key; None takes the most probable token, the lowest id among equals.
      positions: of the tokens to be chosen. The random numbers depend on key, position and token alone.
      filtered: whether top-k, top-p or min-p does anything.
    """
    penalty = sampling.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        return argmax(logits, partition)
    logits = logits / sampling.temperature
    if filtered:
        logits = jnp.where(logits >= _threshold(logits, sampling, partition), logits, -jnp.inf)
    size = logits.shape[1]
    first = partition.axis_index(*VOCAB_AXES) * (size // VOCAB_BLOCK)
    blocks = first + jnp.arange(-(-size // VOCAB_BLOCK))

    def noise(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        draw = jax.vmap(lambda block: jax.random.gumbel(jax.random.fold_in(key, block), (VOCAB_BLOCK,)))
        return draw(blocks).reshape(-1)[:size]

    return argmax(logits + jax.vmap(noise)(keys, positions), partition)


def argmax(logits: Float[Array, "B V"], partition: Partition = ONE_DEVICE) -> Int[Array, "B"]:
    """The id of each row's largest logit, the lowest among equals."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if partition.size(*VOCAB_AXES) == 1:
        return best
    value = jnp.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    first = partition.axis_index(*VOCAB_AXES) * logits.shape[1]
    candidate = jnp.where(value == partition.pmax(value, *VOCAB_AXES), first + best, jnp.iinfo(jnp.int32).max)
    return -partition.pmax(-candidate, *VOCAB_AXES)


def _threshold(logits: Float[Array, "B V"], sampling: Sampling, partition: Partition) -> Float[Array, "B 1"]:
    """The least logit that top-k, then top-p (Holtzman et al. 2019, arXiv:1904.09751) and then min-p
    (Nguyen et al. 2024, arXiv:2407.01082) leave in. Equal logits stay or go together.

    Found by halving the numbers there are rather than by sorting, which takes longer and needs the whole row.
    """

    def count(keep: Array) -> Array:
        return partition.psum(keep.sum(axis=-1, dtype=jnp.int32), *VOCAB_AXES)

    largest = partition.pmax(logits.max(axis=-1), *VOCAB_AXES)[:, None]
    kth = _largest_number(lambda least: count(logits >= least[:, None]) >= sampling.top_k, logits.shape[0])[:, None]
    weights = jnp.where(logits >= kth, jnp.exp(logits - largest), 0)
    total = partition.psum(weights.sum(axis=-1), *VOCAB_AXES)

    def outside(least: Array) -> Array:
        """Returns whether the tokens more probable than `least` reach top_p without it."""
        above = partition.psum(jnp.where(logits > least[:, None], weights, 0).sum(axis=-1), *VOCAB_AXES)
        return (above >= sampling.top_p * total) & jnp.less(sampling.top_p, 1)

    # The most probable stays whatever top_p is.
    unneeded = _largest_number(outside, logits.shape[0])[:, None]
    least = jnp.min(jnp.where(logits > unneeded, logits, jnp.inf), axis=-1)
    least = jnp.minimum(-partition.pmax(-least, *VOCAB_AXES)[:, None], largest)
    return jnp.maximum(jnp.maximum(kth, least), largest + jnp.log(sampling.min_p))


def _largest_number(holds: Callable[[Array], Array], rows: int) -> Float[Array, "B"]:
    """For each row the largest float32 of which `holds` is true, where it is true up to some number and false
    beyond; the least number there is where it is never true. Bit by bit: floats are ordered as their bits are."""

    def step(i: Array, prefix: Array) -> Array:
        candidate = prefix | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(_float_of(candidate)), candidate, prefix)

    return _float_of(lax.fori_loop(0, 32, step, jnp.zeros(rows, jnp.uint32)))


def _float_of(order: Array) -> Array:
    """The float32 whose place among all of them, the least first, is `order`; what is no number becomes infinite."""
    bits = jnp.where(order >> 31, order ^ jnp.uint32(1 << 31), ~order)
    value = lax.bitcast_convert_type(bits, jnp.float32)
    infinity = jnp.where(order >> 31, jnp.inf, -jnp.inf)
    return jnp.where(jnp.isnan(value), infinity, value)


def row_keys(seeds: Int[Array, "B"], rows: Int[Array, "B"] | None) -> UInt32[Array, "B 2"]:
    """Each row's random key: of its own seed, or with `rows` of the seed folded with the row's number."""
    keys = jax.vmap(jax.random.key)(seeds)
    if rows is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, rows)
    return jax.random.key_data(keys)
