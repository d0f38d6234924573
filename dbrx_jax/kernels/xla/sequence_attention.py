"""Blockwise causal attention of whole sequences in plain XLA, which never holds T x T scores.

The forward pass goes over blocks of keys with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
The backward pass recomputes each block's probabilities from the log-sum-exp of its scores (Dao et al. 2022,
arXiv:2205.14135, algorithm 4). Blocks after the diagonal are not computed.
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

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""],
    block: int,
) -> Float[Array, "B T H K"]:
    """Computes softmax(query key^T / sqrt(K)) value over the valid keys up to each query; 0 where there are none.

    Args:
      first: position of the first query: query t sees the valid keys among 0 … first + t.
      block: queries and keys that are computed together.
    """
    return _forward(query, key, value, valid, first, block)[0]


def _split_blocks(x: Array, block: int, kv_heads: int) -> Array:
    """Reshapes (B, T, G I, K), G = kv_heads, to (num_blocks, B, G, I, block, K), padded with zeros."""
    B, T, heads, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    return x.reshape(B, -1, block, kv_heads, heads // kv_heads, K).transpose(1, 0, 3, 4, 2, 5)


def _join_blocks(blocks: Array, length: int) -> Array:
    """Reshapes the result of :func:`_split_blocks` back to (B, length, G I, K), without padding."""
    num_blocks, B, G, I, block, K = blocks.shape  # noqa: E741
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(B, num_blocks * block, G * I, K)[:, :length]


def _split_valid(valid: Array, block: int) -> Array:
    """Reshapes (B, S) to (num_blocks, B, 1, 1, 1, block), padded with False."""
    valid = jnp.pad(valid, ((0, 0), (0, -valid.shape[1] % block)))
    return valid.reshape(valid.shape[0], -1, block).swapaxes(0, 1)[:, :, None, None, None]


def _scores(q: Array, k: Array, valid: Array, first_query: Array, first_key: Array) -> Array:
    """Returns masked scores (B, G, I, block, block) of queries (B, G, I, block, K) to keys (B, G, 1, block, K)."""
    scores = _einsum("bgitk,bgosk->bgits", q, k) / math.sqrt(q.shape[-1])
    offsets = jnp.arange(q.shape[-2])
    visible = (first_key + offsets <= first_query + offsets[:, None]) & valid
    return jnp.where(visible, scores, -jnp.inf)


def _forward(query, key, value, valid, first, block: int) -> tuple[Array, Any]:
    qs, ks, vs = (_split_blocks(x, block, key.shape[2]) for x in (query, key, value))
    valid_blocks = _split_valid(valid, block)

    def attend(query_block: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q = query_block
        first_query = first + i * block

        def add_keys(j, carry):
            max_score, sum_exp, out = carry
            scores = _scores(q, ks[j], valid_blocks[j], first_query, j * block)
            new_max = jnp.maximum(max_score, scores.max(axis=-1))
            rescale = jnp.exp(max_score - new_max)
            probs = jnp.exp(scores - new_max[..., None])  # unnormalised
            block_out = _einsum("bgits,bgosk->bgitk", probs.astype(value.dtype), vs[j])
            return new_max, sum_exp * rescale + probs.sum(axis=-1), out * rescale[..., None] + block_out

        initial = jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32)
        num_blocks = jnp.minimum((first_query + block - 1) // block + 1, len(ks))  # up to the diagonal
        max_score, sum_exp, out = lax.fori_loop(0, num_blocks, add_keys, initial)
        normaliser = jnp.where(sum_exp > 0, sum_exp, 1)
        return (out / normaliser[..., None]).astype(query.dtype), max_score + jnp.log(normaliser)

    outs, log_sum_exps = lax.map(attend, (jnp.arange(len(qs)), qs))
    out = _join_blocks(outs, query.shape[1])
    return out, (query, key, value, valid, first, out, log_sum_exps)


def _backward(block: int, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    query, key, value, valid, first, out, log_sum_exps = residuals
    G, dtype = key.shape[2], value.dtype
    qs, ks, vs = (_split_blocks(x, block, G) for x in (query, key, value))
    valid_blocks, d_outs = _split_valid(valid, block), _split_blocks(d_out, block, G)
    # Row sums of probs * d_probs, from the output (D in Dao et al.).
    deltas = jnp.sum(d_outs.astype(jnp.float32) * _split_blocks(out, block, G).astype(jnp.float32), axis=-1)

    def add_key_block(d_qs: Array, key_block: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        j, k, v, valid = key_block

        def add_queries(i, carry):
            d_qs, d_k, d_v = carry
            scores = _scores(qs[i], k, valid, first + i * block, j * block)
            probs = jnp.exp(scores - log_sum_exps[i][..., None])
            d_probs = _einsum("bgitk,bgosk->bgits", d_outs[i], v)
            d_scores = (probs * (d_probs - deltas[i][..., None]) / math.sqrt(query.shape[-1])).astype(dtype)
            d_q = d_qs[i] + _einsum("bgits,bgosk->bgitk", d_scores, k)
            d_k = d_k + _einsum("bgits,bgitk->bgsk", d_scores, qs[i])[:, :, None]
            d_v = d_v + _einsum("bgits,bgitk->bgsk", probs.astype(dtype), d_outs[i])[:, :, None]
            return d_qs.at[i].set(d_q), d_k, d_v

        first_block = jnp.clip((j * block - first) // block, 0, len(qs))  # earlier queries do not see these keys
        zeros = jnp.zeros(k.shape, jnp.float32)
        d_qs, d_k, d_v = lax.fori_loop(first_block, len(qs), add_queries, (d_qs, zeros, zeros))
        return d_qs, (d_k, d_v)

    initial = jnp.zeros(qs.shape, jnp.float32)
    d_qs, (d_ks, d_vs) = lax.scan(add_key_block, initial, (jnp.arange(len(ks)), ks, vs, valid_blocks))
    gradients = (_join_blocks(d, x.shape[1]).astype(x.dtype) for d, x in ((d_qs, query), (d_ks, key), (d_vs, value)))
    return *gradients, *(np.zeros(jnp.shape(x), jax.dtypes.float0) for x in (valid, first))


blockwise_attention.defvjp(_forward, _backward)
