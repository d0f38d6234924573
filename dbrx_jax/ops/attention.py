"""Reference implementations of grouped-query attention, and the merge of partial attention.

Query head i reads key and value head i // (H / G), for H query heads and G key and value heads.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.sharding.partition import CONTEXT_AXIS, Partition

MASKED = -1e30  # not -inf: softmax over no visible keys must give finite numbers rather than NaN


def reference_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """Computes softmax(query key^T / sqrt(K)) value over the keys where `mask` is true, with the softmax in float32."""
    B, T, H, K = query.shape
    G = key.shape[2]
    q = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgik,bsgk->bgits", q, key, preferred_element_type=jnp.float32) / math.sqrt(K)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bgits,bsgk->btgik", probs.astype(value.dtype), value)
    return out.reshape(B, T, H, K)


class PartialAttention(NamedTuple):
    """Unnormalised attention of T queries a row to some of the keys; sum_exp and out are 0 if a query sees none."""

    max_score: Float[Array, "R T H"]  # float32
    sum_exp: Float[Array, "R T H"]  # sum of exp(score - max_score), float32
    out: Float[Array, "R T H K"]  # sum of exp(score - max_score) value, float32


def read_blocks(pool: Float[Array, "N G P *rest"], table: Int[Array, "R W"]) -> Float[Array, "R G S *rest"]:
    """Returns the blocks of each row's table one after another, in float32; uint16 is read as bfloat16."""
    pool = lax.bitcast_convert_type(pool, jnp.bfloat16) if pool.dtype == jnp.uint16 else pool
    rows = pool[table].astype(jnp.float32).swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1, *pool.shape[3:])


def reference_cached_attention(query, key, value, positions, table, context_shard, scales) -> PartialAttention:
    """Computes kernels.attention.cached_attention, with its arguments, with all scores of a row at once."""
    R, T, H, K = query.shape
    shard, num_shards = context_shard
    rows = [read_blocks(x, table) for x in (key, value, *(scales or ()))]
    k, v = (x * scale[..., None] for x, scale in zip(rows[:2], rows[2:], strict=True)) if scales else rows
    q = query.astype(jnp.float32).reshape(R, T, key.shape[1], -1, K)
    scores = jnp.einsum("rtgik,rgsk->rtgis", q, k) / math.sqrt(K)
    key_positions = jnp.arange(k.shape[2]) * num_shards + shard
    visible = key_positions <= positions[:, :, None]  # (R, T, S)
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    max_score = jnp.maximum(scores.max(axis=-1), MASKED)
    probs = jnp.exp(scores - max_score[..., None])  # unnormalised
    out = jnp.einsum("rtgis,rgsk->rtgik", probs, v)
    return PartialAttention(max_score.reshape(R, T, H), probs.sum(axis=-1).reshape(R, T, H), out.reshape(R, T, H, K))


def merge_partial_attention(part: PartialAttention, dtype: DTypeLike, partition: Partition) -> Float[Array, "R T H K"]:
    """Merges the partial attention of devices along CONTEXT_AXIS, each to its positions of the cache; normalises.

    The sums are in float32. Where tokens are split between layers, each device adds up and rounds those of its tokens,
    and all-gathers the results: less than an all-reduce sends.
    """
    sum_exp, out = part.sum_exp, part.out
    is_split = partition.size(CONTEXT_AXIS) > 1 and partition.tokens_split
    if partition.size(CONTEXT_AXIS) > 1:
        rescale = jnp.exp(part.max_score - partition.pmax(part.max_score, CONTEXT_AXIS))
        if is_split:
            out, sum_exp = (partition.scatter_sums(x) for x in (out * rescale[..., None], sum_exp * rescale))
        else:
            sums = jnp.concatenate([out, sum_exp[..., None]], axis=-1) * rescale[..., None]  # one psum for both
            sums = partition.psum(sums, CONTEXT_AXIS)
            out, sum_exp = sums[..., :-1], sums[..., -1]
    merged = (out / sum_exp[..., None]).astype(dtype)
    return partition.gather_tokens(merged) if is_split else merged
