"""Grouped-query attention: query head i reads key and value head i // (H / G), for H query and G kv heads.

Each of two functions, for whole sequences and through a cache, has three implementations: "reference", the
definition with all scores at once; "xla", in blocks; and "flash", kernels that keep scores on the chip.
"flash" leaves to "xla" what its kernels do not take.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.errors import ConfigError
from dbrx_jax.kernels.attention import attention_kernels
from dbrx_jax.kernels.attention_xla import blockwise_attention
from dbrx_jax.kernels.choice import LEAST_JAX_ON_GPU, kind_of
from dbrx_jax.sharding import GPU, STRIPES, Partition

IMPLEMENTATIONS = ("reference", "xla", "flash")

# Not -inf: a row that may see nothing must give some number rather than NaN.
MASKED = -1e30
# Positions that a prompt's chunk looks at together, but on a CPU: as many scores as their matrix units like.
PROMPT_BLOCK = 1024
# Sequences of up to so many tokens are one block, which the definition computes faster.
SHORT_SEQUENCE = 1024
# Queries and keys of a longer one that are computed together.
SEQUENCE_BLOCK = 512


def chosen(implementation: str | None, platform: str) -> str:
    """The implementation's name; None is the platform's best.

    Raises:
      ConfigError: there is none of that name, or none for the platform.
    """
    if implementation is None:
        return "flash" if kind_of(platform) else "xla"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ConfigError(f"attention_implementation: expected one of {names}, got {implementation!r}")
    if implementation == "flash" and kind_of(platform) is None:
        needs = f"a Hopper GPU and jax {'.'.join(map(str, LEAST_JAX_ON_GPU))}" if platform in GPU else "a TPU or GPU"
        raise ConfigError(f'attention_implementation: "flash" needs {needs}; take "xla" or leave it out')
    return implementation


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


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""] | int = 0,
    implementation: str = "xla",
    platform: str = "cpu",
) -> Float[Array, "B T H K"]:
    """Attention among a sequence's own tokens: query t sees the valid ones of keys 0 … first + t. Has gradients.

    A query that sees nothing, or is padding, gives some finite number.

    Args:
      valid: False for padding.
      first: the place of the first query, on a device that has the later part of the tokens.
      implementation: as :func:`chosen` gives it.
    """
    T, S = query.shape[1], key.shape[1]
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is not None and kernels.sequence.supports(query, key, value):
        return kernels.sequence.sequence_attention(query, key, value, valid, jnp.int32(first))
    if implementation == "reference" or S <= SHORT_SEQUENCE:
        visible = (jnp.arange(S) <= first + jnp.arange(T)[:, None]) & valid[:, None, :]
        return reference_attention(query, key, value, visible)
    return blockwise_attention(query, key, value, valid, jnp.int32(first), SEQUENCE_BLOCK)


class AttentionPart(NamedTuple):
    """Attention to some of the keys: what joins to the whole. A query that saw none has total and out 0."""

    largest: Float[Array, "R T H"]  # score, float32
    total: Float[Array, "R T H"]  # sum of exp(score - largest)
    out: Float[Array, "R T H K"]  # sum of exp(score - largest) value, float32


def cached_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
    block: int,
    stripe: tuple[Int[Array, ""] | int, int] = (0, 1),
    platform: str = "cpu",
    scales: tuple[Float[Array, "B G S"], Float[Array, "B G S"]] | None = None,
    implementation: str = "xla",
) -> AttentionPart:
    """Attention of rows first_row … first_row + R of a cache: a query at position p sees positions 0 … p.

    Several queries of one row must follow one another. The cache is read in blocks of `block` positions, and
    only as far as some query looks (by a single query on a GPU in plain XLA, all at once). Sums are kept as a
    running maximum, normaliser and output (Milakov and Gimelshein 2018, arXiv:1805.02867): a block that a query
    does not see changes none of its bits, so the result does not depend on the cache's length nor on how far
    the other rows have come.

    Args:
      stripe: (x, X) where the cache holds every X-th position from x on; (0, 1) for all.
      platform: on a CPU products are of float32, elsewhere of the query's dtype with float32 sums.
      scales: of the keys and the values of an int8 cache.
      implementation: as :func:`chosen` gives it.
    """
    if implementation == "reference":
        return _reference_part(query, key, value, positions, first_row, stripe, scales)
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is not None and kernels.cache.supports(query, key, value):
        starts = positions[:, 0]
        return AttentionPart(*kernels.cache.cache_attention(query, key, value, starts, first_row, stripe, scales))
    R, T, H, K = query.shape
    G, S = key.shape[1:3]
    if platform in GPU and T == 1:
        block = S  # its products take no slices: each block would be copied
    elif platform != "cpu" and T > 1:
        block = math.gcd(S, PROMPT_BLOCK)
    dtype = jnp.float32 if platform == "cpu" else query.dtype
    offset, stride = stripe
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
    return AttentionPart(
        largest.transpose(0, 3, 1, 2).reshape(R, T, H),
        total.transpose(0, 3, 1, 2).reshape(R, T, H),
        out.transpose(0, 3, 1, 2, 4).reshape(R, T, H, K),
    )


def _reference_part(query, key, value, positions, first_row, stripe, scales) -> AttentionPart:
    """cached_attention's definition, over the whole cache."""
    R, T, H, K = query.shape
    rows = [lax.dynamic_slice_in_dim(x, first_row, R).astype(jnp.float32) for x in (key, value, *(scales or ()))]
    k, v = (x * scale[..., None] for x, scale in zip(rows[:2], rows[2:], strict=True)) if scales else rows
    q = query.astype(jnp.float32).reshape(R, T, key.shape[1], -1, K)
    scores = jnp.einsum("rtgik,rgsk->rtgis", q, k) / math.sqrt(K)
    seen = jnp.arange(k.shape[2]) * stripe[1] + stripe[0] <= positions[:, :, None]
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    largest = jnp.maximum(scores.max(axis=-1), MASKED)
    shares = jnp.exp(scores - largest[..., None])
    out = jnp.einsum("rtgis,rgsk->rtgik", shares, v)
    return AttentionPart(largest.reshape(R, T, H), shares.sum(axis=-1).reshape(R, T, H), out.reshape(R, T, H, K))


def join_stripes(part: AttentionPart, dtype: DTypeLike, partition: Partition) -> Float[Array, "R T H K"]:
    """The attention to all keys from that to each device's stripe of the cache."""
    total, out = part.total, part.out
    if partition.size(STRIPES) > 1:
        share = jnp.exp(part.largest - partition.max(part.largest, STRIPES))
        both = jnp.concatenate([out, total[..., None]], axis=-1) * share[..., None]
        both = partition.sum(both, STRIPES)
        out, total = both[..., :-1], both[..., -1]
    return (out / total[..., None]).astype(dtype)
