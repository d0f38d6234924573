"""Log-probabilities of tokens under logits whose vocabulary is split over the devices of a mesh."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, Partition


def log_probability(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], partition: Partition = ONE_DEVICE
) -> Float[Array, "*batch"]:
    """log softmax(logits) at the tokens, in nats."""
    largest = partition.pmax(lax.stop_gradient(logits).max(axis=-1), *VOCAB_AXES)
    total = partition.psum(jnp.exp(logits - largest[..., None]).sum(axis=-1), *VOCAB_AXES)
    local = tokens - partition.axis_index(*VOCAB_AXES) * logits.shape[-1]
    here = (local >= 0) & (local < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(here, local, 0)[..., None], axis=-1)[..., 0]
    return partition.psum(jnp.where(here, picked, 0), *VOCAB_AXES) - largest - jnp.log(total)
