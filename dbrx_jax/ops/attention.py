"""Grouped-query attention: query head i reads key and value head i // (H / G), for H query and G kv heads."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

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


def cached_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
    block: int,
) -> Float[Array, "R T H K"]:
    """Attention of rows first_row … first_row + R of a cache: a query at position p sees positions 0 … p.

    The cache is read in blocks of `block` positions, and only as far as some query looks. Sums are
    kept as a running maximum, normaliser and output (Milakov and Gimelshein 2018, arXiv:1805.02867):
    a block that a query does not see changes none of its bits, so the result does not depend on
    the cache's length nor on how far the other rows have come.
    """
    R, T, H, K = query.shape
    G = key.shape[1]
    q = query.reshape(R, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # (R, G, H/G, T, K)
    q = q.astype(jnp.float32) / math.sqrt(K)

    def add(i, carry):
        largest, total, out = carry
        start = (first_row, 0, i * block, 0)
        k, v = (lax.dynamic_slice(x, start, (R, G, block, K)).astype(jnp.float32) for x in (key, value))
        scores = jnp.einsum("rgitk,rgsk->rgits", q, k)
        seen = i * block + jnp.arange(block) <= positions[:, :, None]  # (R, T, block)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new = jnp.maximum(largest, scores.max(axis=-1))
        old_share = jnp.exp(largest - new)
        probs = jnp.exp(scores - new[..., None])
        total = total * old_share + probs.sum(axis=-1)
        return new, total, out * old_share[..., None] + jnp.einsum("rgits,rgsk->rgitk", probs, v)

    shape = q.shape[:-1]
    initial = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q.shape))
    _, total, out = lax.fori_loop(0, jnp.max(positions) // block + 1, add, initial)
    out = (out / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(R, T, H, K)
    return out.astype(query.dtype)
