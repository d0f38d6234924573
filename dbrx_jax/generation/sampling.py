"""Samples the next token from logits, which on a mesh stay split over the vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt32

from dbrx_jax.generation.filters import Filters, filter_logits
from dbrx_jax.generation.rows import take_rows
from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, VOCAB_BLOCK, Partition


class Sampling(NamedTuple):
    """Parameters of sampling, each with a dimension of M slots in front, or of 1 if all rows share a value."""

    keys: UInt32[ArrayLike, "M 2"]  # random keys of the rows
    temperature: Float[ArrayLike, "M"]
    filters: Filters = Filters()
    do_sample: Bool[ArrayLike, "M"] | None = None  # False for greedy rows; None: all rows sample


def scale_and_filter(
    logits: Float[Array, "R V"], sampling: Sampling, slots: Int[Array, "R"], partition: Partition = ONE_DEVICE
) -> Float[Array, "R V"]:
    """Divides logits by the temperature and removes tokens; on a mesh, of this device's shard of the vocabulary."""
    logits = logits / take_rows(sampling.temperature, slots)[:, None]
    return filter_logits(logits, sampling.filters, slots, partition)


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    positions: Int[Array, "B"],
    partition: Partition = ONE_DEVICE,
) -> Int[Array, "B"]:
    """Samples the next token of each row from softmax(logits), by adding Gumbel noise and taking the largest.

    Args:
      logits: float32; on a mesh, this device's shard of the vocabulary.
      keys: each row's random key.
      positions: of the sampled tokens. The random numbers depend on key, position and token alone.
    """
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


@jax.jit
def row_keys(seeds: Int[Array, "B"], rows: Int[Array, "B"] | None) -> UInt32[Array, "B 2"]:
    """Returns each row's random key: that of its seed, folded with its row number if `rows` are given."""
    keys = jax.vmap(jax.random.key)(seeds)
    if rows is not None:
        keys = jax.vmap(jax.random.fold_in)(keys, rows)
    return jax.random.key_data(keys)
