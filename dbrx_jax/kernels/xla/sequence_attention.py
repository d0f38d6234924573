"""Causal attention of whole sequences in blocks, in plain XLA: neither pass ever holds T x T scores.

The forward pass keeps a running maximum, normaliser and output over blocks of keys (Milakov and Gimelshein
2018, arXiv:1805.02867); the backward pass makes each block's probabilities again from the logarithm of the
normaliser (Dao et al. 2022, arXiv:2205.14135, algorithm 4). Blocks after the diagonal are not computed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from dbrx_jax.ops.attention import MASKED


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""],
    block: int,
) -> Float[Array, "B T H K"]:
    """softmax(query key^T / sqrt(K)) value over the valid keys up to each query; 0 where there are none.

    Args:
      first: the queries' place among the keys: query t sees the valid ones of keys 0 … first + t.
      block: queries and keys that are computed together.
    """
    return _forward(query, key, value, valid, first, block)[0]


def _in_blocks(x: Array, block: int, heads: int) -> Array:
    """Reshapes (B, T, heads I, K) to (blocks, B, heads, I, block, K), padded with zeros."""
    B, T, many, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    return x.reshape(B, -1, block, heads, many // heads, K).transpose(1, 0, 3, 4, 2, 5)


def _merged(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The way back, to an array (B, T, H, K) of this shape."""
    n, B, G, I, block, K = blocks.shape  # noqa: E741
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * block, G * I, K)[:, : shape[1]]


def _valid_blocks(valid: Array, block: int) -> Array:
    """(blocks, B, 1, 1, 1, block)"""
    valid = jnp.pad(valid, ((0, 0), (0, -valid.shape[1] % block)))
    return valid.reshape(valid.shape[0], -1, block).swapaxes(0, 1)[:, :, None, None, None]


def _scores(q: Array, k: Array, valid: Array, first_query: Array, first_key: Array) -> Array:
    """(B, G, I, block, block) of queries (B, G, I, block, K) to keys (B, G, 1, block, K); -inf where masked."""
    scores = jnp.einsum("bgitk,bgosk->bgits", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    ids = jnp.arange(q.shape[-2])
    seen = (first_key + ids <= first_query + ids[:, None]) & valid
    return jnp.where(seen, scores, -jnp.inf)


def _key_blocks(first_query: Array, block: int, count: int) -> Array:
    """Number of key blocks, of `count`, that a block of queries attends to."""
    return jnp.minimum((first_query + block - 1) // block + 1, count)


def _forward(query, key, value, valid, first, block: int) -> tuple[Array, Any]:
    G = key.shape[2]
    qs, ks, vs, seen = (*(_in_blocks(x, block, G) for x in (query, key, value)), _valid_blocks(valid, block))

    def of_queries(at: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q = at
        first_query = first + i * block

        def add(j, carry):
            largest, total, out = carry
            scores = _scores(q, ks[j], seen[j], first_query, j * block)
            new = jnp.maximum(largest, scores.max(axis=-1))
            share = jnp.exp(largest - new)
            probs = jnp.exp(scores - new[..., None])
            more = jnp.einsum(
                "bgits,bgosk->bgitk", probs.astype(value.dtype), vs[j], preferred_element_type=jnp.float32
            )
            return new, total * share + probs.sum(axis=-1), out * share[..., None] + more

        shape = q.shape[:-1]
        start = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
        largest, total, out = lax.fori_loop(0, _key_blocks(first_query, block, len(ks)), add, start)
        some = jnp.where(total > 0, total, 1)
        return (out / some[..., None]).astype(query.dtype), largest + jnp.log(some)

    outs, norms = lax.map(of_queries, (jnp.arange(len(qs)), qs))
    out = _merged(outs, query.shape)
    return out, (query, key, value, valid, first, out, norms)


def _backward(block: int, kept: Any, d_out: Array) -> tuple[Any, ...]:
    query, key, value, valid, first, out, norms = kept
    G, dtype = key.shape[2], value.dtype
    qs, ks, vs, seen = (*(_in_blocks(x, block, G) for x in (query, key, value)), _valid_blocks(valid, block))
    d_outs = _in_blocks(d_out, block, G)
    deltas = jnp.sum(d_outs.astype(jnp.float32) * _in_blocks(out, block, G).astype(jnp.float32), axis=-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_keys(d_qs: Array, at: tuple[Array, Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        j, k, v, valid = at

        def add(i, carry):
            d_qs, d_k, d_v = carry
            probs = jnp.exp(_scores(qs[i], k, valid, first + i * block, j * block) - norms[i][..., None])
            d_probs = einsum("bgitk,bgosk->bgits", d_outs[i], v)
            d_scores = (probs * (d_probs - deltas[i][..., None]) / math.sqrt(query.shape[-1])).astype(dtype)
            d_q = d_qs[i] + einsum("bgits,bgosk->bgitk", d_scores, k)
            d_k = d_k + einsum("bgits,bgitk->bgsk", d_scores, qs[i])[:, :, None]
            d_v = d_v + einsum("bgits,bgitk->bgsk", probs.astype(dtype), d_outs[i])[:, :, None]
            return d_qs.at[i].set(d_q), d_k, d_v

        least = jnp.clip((j * block - first) // block, 0, len(qs))  # the first queries that look here
        zeros = jnp.zeros(k.shape, jnp.float32)
        d_qs, d_k, d_v = lax.fori_loop(least, len(qs), add, (d_qs, zeros, zeros))
        return d_qs, (d_k, d_v)

    start = jnp.zeros(qs.shape, jnp.float32)
    d_qs, (d_ks, d_vs) = lax.scan(of_keys, start, (jnp.arange(len(ks)), ks, vs, seen))
    found = [_merged(d, x.shape).astype(x.dtype) for d, x in ((d_qs, query), (d_ks, key), (d_vs, value))]
    return *found, *(np.zeros(jnp.shape(x), jax.dtypes.float0) for x in (valid, first))


blockwise_attention.defvjp(_forward, _backward)
