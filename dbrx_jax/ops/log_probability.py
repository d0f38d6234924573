"""Log-probabilities of tokens under logits whose vocabulary is sharded over a mesh."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, Partition


def log_probability(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], partition: Partition = ONE_DEVICE
) -> Float[Array, "*batch"]:
    """Returns log softmax(logits) at the tokens, in nats."""
    max_logit = partition.pmax(lax.stop_gradient(logits).max(axis=-1), *VOCAB_AXES)
    sum_exp = partition.psum(jnp.exp(logits - max_logit[..., None]).sum(axis=-1), *VOCAB_AXES)
    local_tokens = tokens - partition.axis_index(*VOCAB_AXES) * logits.shape[-1]
    is_local = (local_tokens >= 0) & (local_tokens < logits.shape[-1])
    token_logits = jnp.take_along_axis(logits, jnp.where(is_local, local_tokens, 0)[..., None], axis=-1)[..., 0]
    return partition.psum(jnp.where(is_local, token_logits, 0), *VOCAB_AXES) - max_logit - jnp.log(sum_exp)
