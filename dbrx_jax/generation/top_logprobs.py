"""The most probable next tokens of rows, and their log-probabilities."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.generation.filters import log_softmax
from dbrx_jax.generation.rows import take_rows
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition


def most_probable(
    logits: Float[Array, "R V"], number: int, partition: Partition
) -> tuple[Int[Array, "R n"], Float[Array, "R n"]]:
    """Returns the ids of the most probable tokens, the first most, and their log-probabilities in nats.

    Args:
      logits: float32; on a mesh, this device's shard of the vocabulary.
    """
    logprobs = log_softmax(logits, partition)
    values, ids = lax.top_k(logprobs, min(number, logits.shape[1]))
    ids = ids + partition.axis_index(*VOCAB_AXES) * logits.shape[1]
    if number and partition.size(*VOCAB_AXES) > 1:
        values, ids = (partition.all_gather(a, 1, *VOCAB_AXES) for a in (values, ids))
        values, index = lax.top_k(values, min(number, values.shape[1]))
        ids = jnp.take_along_axis(ids, index, axis=1)
    padding = ((0, 0), (0, number - ids.shape[1]))
    return jnp.pad(ids, padding), jnp.pad(values, padding, constant_values=-jnp.inf)


def top_logprobs(
    logits: Float[Array, "R V"], wanted: Bool[ArrayLike, "M"], slots: Int[Array, "R"], number: int, partition: Partition
) -> tuple[Int[Array, "R n"], Float[Array, "R n"]]:
    """Returns :func:`most_probable`, or zeros if no row of these slots wants them."""
    shape = (logits.shape[0], number)

    def none(logits: Array) -> tuple[Array, Array]:
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    is_wanted = jnp.any(take_rows(wanted, slots))
    return lax.cond(is_wanted, lambda logits: most_probable(logits, number, partition), none, logits)
