"""Attention over the paged key-value cache in plain XLA: blocks of positions with an online softmax."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from dbrx_jax.backend import GPU_PLATFORMS
from dbrx_jax.ops.attention import MASKED, PartialAttention

PREFILL_POSITIONS = 1024  # read at a time in prefill, but on a CPU: enough scores to keep the matrix units busy


def _blocks_at_a_time(num_blocks: int, block_size: int, num_queries: int, platform: str) -> int:
    """Returns the number of a row's blocks to read at a time."""
    if platform in GPU_PLATFORMS and num_queries == 1:
        return num_blocks  # the GPU's matmuls do not read slices: XLA would copy each block
    return 1 if platform == "cpu" or num_queries == 1 else min(num_blocks, max(1, PREFILL_POSITIONS // block_size))


def _read(pool: Array, blocks: Array, dtype: DTypeLike | None = None) -> Array:
    """Returns blocks (R, n) of a pool (N, G, P, …) as (R, G, n P, …), in a dtype."""
    x = pool[blocks].swapaxes(1, 2)
    x = x.reshape(*x.shape[:2], -1, *pool.shape[3:])
    if x.dtype == jnp.uint16:  # bfloat16 in a CPU's cache
        x = lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x if dtype is None else x.astype(dtype)


def cache_attention(query, key, value, positions, table, context_shard, platform: str, scales) -> PartialAttention:
    """Computes :func:`dbrx_jax.kernels.attention.cached_attention`, with its arguments."""
    R, T, H, K = query.shape
    G, block_size = key.shape[1:3]
    num = _blocks_at_a_time(table.shape[1], block_size, T, platform)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % num)))
    num_positions = num * block_size
    dtype = jnp.float32 if platform == "cpu" else query.dtype
    shard, num_shards = context_shard
    q = query.reshape(R, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # (R, G, H/G, T, K)
    q = (q.astype(jnp.float32) / math.sqrt(K)).astype(dtype)

    def add_blocks(i, carry):
        max_score, sum_exp, out = carry
        blocks = lax.dynamic_slice_in_dim(table, i * num, num, axis=1)
        k, v = (_read(x, blocks, dtype) for x in (key, value))
        scores = jnp.einsum("rgitk,rgsk->rgits", q, k, preferred_element_type=jnp.float32)
        if scales is not None:
            key_scales, value_scales = (_read(x, blocks, jnp.float32)[:, :, None, None] for x in scales)
            scores = scores * key_scales
        key_positions = (i * num_positions + jnp.arange(num_positions)) * num_shards + shard
        visible = key_positions <= positions[:, :, None]  # (R, T, n P)
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
        num_steps = jnp.max(positions) // (num_positions * num_shards) + 1
        is_one = num == table.shape[1]
        carry = add_blocks(0, initial) if is_one else lax.fori_loop(0, num_steps, add_blocks, initial)
    max_score, sum_exp = (x.transpose(0, 3, 1, 2).reshape(R, T, H) for x in carry[:2])
    return PartialAttention(max_score, sum_exp, carry[2].transpose(0, 3, 1, 2, 4).reshape(R, T, H, K))
