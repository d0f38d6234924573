"""Attention over the key-value cache in plain XLA: blocks of positions with an online softmax."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dbrx_jax.backend import GPU_PLATFORMS
from dbrx_jax.ops.attention import MASKED, PartialAttention

PREFILL_BLOCK = 1024  # positions in prefill, but on a CPU: enough scores to keep the matrix units busy


def _block_size(block: int, num_positions: int, num_queries: int, platform: str) -> int:
    """Returns the number of positions to read at a time; `block` is the one for a CPU and for decoding on a TPU."""
    if platform in GPU_PLATFORMS and num_queries == 1:
        return num_positions  # the GPU's matmuls do not read slices: XLA would copy each block
    return block if platform == "cpu" or num_queries == 1 else math.gcd(num_positions, PREFILL_BLOCK)


def cache_attention(
    query, key, value, positions, first_row, block: int, context_shard, platform: str, scales
) -> PartialAttention:
    """Computes :func:`dbrx_jax.kernels.attention.cached_attention`, with its arguments."""
    R, T, H, K = query.shape
    G, S = key.shape[1:3]
    block = _block_size(block, S, T, platform)
    dtype = jnp.float32 if platform == "cpu" else query.dtype
    shard, num_shards = context_shard
    q = query.reshape(R, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # (R, G, H/G, T, K)
    q = (q.astype(jnp.float32) / math.sqrt(K)).astype(dtype)

    def add_block(i, carry):
        max_score, sum_exp, out = carry
        start = (first_row, 0, i * block, 0)
        k, v = (lax.dynamic_slice(x, start, (R, G, block, K)).astype(dtype) for x in (key, value))
        scores = jnp.einsum("rgitk,rgsk->rgits", q, k, preferred_element_type=jnp.float32)
        if scales is not None:
            block_scales = (lax.dynamic_slice(x, start[:3], (R, G, block)).astype(jnp.float32) for x in scales)
            key_scales, value_scales = (x[:, :, None, None] for x in block_scales)
            scores = scores * key_scales
        key_positions = (i * block + jnp.arange(block)) * num_shards + shard
        visible = key_positions <= positions[:, :, None]  # (R, T, block)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_max = jnp.maximum(max_score, scores.max(axis=-1))
        rescale = jnp.exp(max_score - new_max)
        probs = jnp.exp(scores - new_max[..., None])  # unnormalised
        sum_exp = sum_exp * rescale + probs.sum(axis=-1)
        probs = probs if scales is None else probs * value_scales
        block_out = jnp.einsum("rgits,rgsk->rgitk", probs.astype(dtype), v, preferred_element_type=jnp.float32)
        return new_max, sum_exp, out * rescale[..., None] + block_out

    initial = (jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32))
    with jax.named_scope("cache_blocks"):
        num_blocks = jnp.max(positions) // (block * num_shards) + 1
        carry = add_block(0, initial) if block == S else lax.fori_loop(0, num_blocks, add_block, initial)
    max_score, sum_exp = (x.transpose(0, 3, 1, 2).reshape(R, T, H) for x in carry[:2])
    return PartialAttention(max_score, sum_exp, carry[2].transpose(0, 3, 1, 2, 4).reshape(R, T, H, K))
