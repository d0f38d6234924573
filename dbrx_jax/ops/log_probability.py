"""Log-probabilities of tokens under logits whose vocabulary is split over the devices of a mesh."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from dbrx_jax.sharding.partition import ONE_DEVICE, VOCABULARY, Partition


def log_probability(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], partition: Partition = ONE_DEVICE
) -> Float[Array, "*batch"]:
    """log softmax(logits) at the tokens, in nats."""
    largest = partition.max(lax.stop_gradient(logits).max(axis=-1), *VOCABULARY)
    total = partition.sum(jnp.exp(logits - largest[..., None]).sum(axis=-1), *VOCABULARY)
    local = tokens - partition.index(*VOCABULARY) * logits.shape[-1]
    here = (local >= 0) & (local < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(here, local, 0)[..., None], axis=-1)[..., 0]
    return partition.sum(jnp.where(here, picked, 0), *VOCABULARY) - largest - jnp.log(total)
