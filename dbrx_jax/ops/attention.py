"""Grouped-query attention by its definition, and merging attention to parts of the keys.

Query head i reads key and value head i // (H / G), for H query heads and G key and value heads.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from dbrx_jax.sharding.partition import CONTEXT_AXIS, Partition

# Not -inf: a row that may see nothing must give some number rather than NaN.
MASKED = -1e30


def reference_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """softmax(query key^T / sqrt(K)) value, softmax in float32, over the keys that `mask` lets a query see."""
    B, T, H, K = query.shape
    G = key.shape[2]
    q = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgik,bsgk->bgits", q, key, preferred_element_type=jnp.float32) / math.sqrt(K)
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bgits,bsgk->btgik", probs.astype(value.dtype), value)
    return out.reshape(B, T, H, K)


class PartialAttention(NamedTuple):
    """Attention to some of the keys: what joins to the whole. A query that saw none has total and out 0."""

    largest: Float[Array, "R T H"]  # score, float32
    total: Float[Array, "R T H"]  # sum of exp(score - largest)
    out: Float[Array, "R T H K"]  # sum of exp(score - largest) value, float32


def reference_cached_attention(query, key, value, positions, first_row, context_shard, scales) -> PartialAttention:
    """Attention of rows of a cache by its definition, over the whole cache; arguments as in kernels/attention.py."""
    R, T, H, K = query.shape
    rows = [lax.dynamic_slice_in_dim(x, first_row, R).astype(jnp.float32) for x in (key, value, *(scales or ()))]
    k, v = (x * scale[..., None] for x, scale in zip(rows[:2], rows[2:], strict=True)) if scales else rows
    q = query.astype(jnp.float32).reshape(R, T, key.shape[1], -1, K)
    scores = jnp.einsum("rtgik,rgsk->rtgis", q, k) / math.sqrt(K)
    seen = jnp.arange(k.shape[2]) * context_shard[1] + context_shard[0] <= positions[:, :, None]
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    largest = jnp.maximum(scores.max(axis=-1), MASKED)
    shares = jnp.exp(scores - largest[..., None])
    out = jnp.einsum("rtgis,rgsk->rtgik", shares, v)
    return PartialAttention(largest.reshape(R, T, H), shares.sum(axis=-1).reshape(R, T, H), out.reshape(R, T, H, K))


def merge_partial_attention(part: PartialAttention, dtype: DTypeLike, partition: Partition) -> Float[Array, "R T H K"]:
    """The attention to all keys from that to each device's context_shard of the cache."""
    total, out = part.total, part.out
    if partition.size(CONTEXT_AXIS) > 1:
        share = jnp.exp(part.largest - partition.pmax(part.largest, CONTEXT_AXIS))
        both = jnp.concatenate([out, total[..., None]], axis=-1) * share[..., None]
        both = partition.psum(both, CONTEXT_AXIS)
        out, total = both[..., :-1], both[..., -1]
    return (out / total[..., None]).astype(dtype)
