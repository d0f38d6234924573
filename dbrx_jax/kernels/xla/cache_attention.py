"""Attention through the key-value cache in plain XLA, block by block with a running softmax."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dbrx_jax.backend import GPU_PLATFORMS
from dbrx_jax.ops.attention import MASKED, PartialAttention

# Positions that the queries of a prompt's chunk attend to together, but on a CPU: as many scores as the matrix
# units like.
PROMPT_BLOCK = 1024


def cache_attention(
    query, key, value, positions, first_row, block: int, context_shard, platform: str, scales
) -> PartialAttention:
    """Computes :func:`dbrx_jax.kernels.attention.cached_attention`, whose arguments these are."""
    R, T, H, K = query.shape
    G, S = key.shape[1:3]
    if platform in GPU_PLATFORMS and T == 1:
        block = S  # its products take no slices: each block would be copied
    elif platform != "cpu" and T > 1:
        block = math.gcd(S, PROMPT_BLOCK)
    dtype = jnp.float32 if platform == "cpu" else query.dtype
    offset, stride = context_shard
    q = query.reshape(R, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # (R, G, H/G, T, K)
    q = (q.astype(jnp.float32) / math.sqrt(K)).astype(dtype)

    def add(i, carry):
        largest, total, out = carry
        start = (first_row, 0, i * block, 0)
        k, v = (lax.dynamic_slice(x, start, (R, G, block, K)).astype(dtype) for x in (key, value))
        scores = jnp.einsum("rgitk,rgsk->rgits", q, k, preferred_element_type=jnp.float32)
        if scales is not None:
            of_keys, of_values = (
                lax.dynamic_slice(x, start[:3], (R, G, block)).astype(jnp.float32)[:, :, None, None] for x in scales
            )
            scores = scores * of_keys
        place = (i * block + jnp.arange(block)) * stride + offset
        seen = place <= positions[:, :, None]  # (R, T, block)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new = jnp.maximum(largest, scores.max(axis=-1))
        old_share = jnp.exp(largest - new)
        probs = jnp.exp(scores - new[..., None])
        total = total * old_share + probs.sum(axis=-1)
        probs = probs if scales is None else probs * of_values
        more = jnp.einsum("rgits,rgsk->rgitk", probs.astype(dtype), v, preferred_element_type=jnp.float32)
        return new, total, out * old_share[..., None] + more

    shape = q.shape[:-1]
    initial = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
    with jax.named_scope("cache_blocks"):
        blocks = jnp.max(positions) // (block * stride) + 1
        largest, total, out = add(0, initial) if block == S else lax.fori_loop(0, blocks, add, initial)
    return PartialAttention(
        largest.transpose(0, 3, 1, 2).reshape(R, T, H),
        total.transpose(0, 3, 1, 2).reshape(R, T, H),
        out.transpose(0, 3, 1, 2, 4).reshape(R, T, H, K),
    )
