"""Attention to the key-value cache on a TPU: scores never leave the chip, and only live positions are read.

One kernel for chunks of a prompt and for decoding. The cache is stored as (B, S, G, K); a step of the grid reads
one block of positions of all heads, for a tile of queries of one row. Blocks that a tile does not look at
repeat the index of the last one that it does, so that nothing is fetched for them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.cache_layout import is_stored_by_head
from dbrx_jax.kernels.tpu.packed_weights import in_hbm

LANES = 128
QUERY_TILE = 128  # tokens
BLOCK = 512  # positions
MASKED = -1e30
VMEM_BYTES = 48 << 20  # of the 64 MiB that a TPU since v5e has at least


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (R, T, H, K) and a cache (B, G, S, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[2]
    floats = query.dtype in (jnp.bfloat16, jnp.float32) and key.dtype in (query.dtype, jnp.int8)
    return floats and key.dtype == value.dtype and K == LANES and S % LANES == 0 and (T == 1 or T % QUERY_TILE == 0)


def tile_of(tokens: int) -> int:
    """Queries of one row that look at the cache together: a power of two."""
    return min(tokens, QUERY_TILE)


def block_of(positions: int) -> int:
    """Positions of the cache that are read together."""
    return math.gcd(positions, BLOCK)


def hbm_bytes(query: Any, key: Any, starts: np.ndarray, context_shard: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Bytes that one call of the kernel reads and writes, for queries (R, T, H, K) and a cache (B, G, S, K).

    Only the kernel's: putting queries and results in order around it is not counted.
    """
    R, T, H, K = query.shape
    G, S = key.shape[1:3]
    tile, block, (offset, stride) = tile_of(T), block_of(S), context_shard
    ends = starts[:, None] + (np.arange(T // tile) + 1) * tile - 1  # of each tile of queries
    blocks = np.maximum(ends - offset, 0) // (block * stride) + 1
    fetched = blocks.sum() - (blocks[:, :-1] == 1).sum()  # after a tile of one block, the next finds it there
    position = G * (K * key.dtype.itemsize + (2 if key.dtype == jnp.int8 else 0))
    queries = R * T * H
    return int(2 * fetched * block * position + queries * K * query.dtype.itemsize), queries * (K + LANES) * 4


def _last_block(last_query: Array, offset: Array, stride: int, block: int) -> Array:
    """The last block with a position that a query at this one sees; the first where there is none."""
    return lax.div(jnp.maximum(last_query - offset, 0), jnp.int32(block * stride))


def _kernel(starts, cache_at, *refs, tile: int, stride: int, by_head: bool, scaled: bool):
    """One step: a tile of queries (1, 1, G, H/G tile, K) against a block of positions (1, block, G, K).

    Queries are ordered by head, then position. Many queries go through the heads in a loop: written out, their
    products take the compiler ten seconds a layer. A loop cannot index a head in the stored block, so they are
    put apart first, which beside the products is little. One query is all reading, and is spared that.
    """
    number = 5 if scaled else 3
    q_ref, *cache_refs = refs[:number]  # keys, values and their scales
    out_ref, stats_ref, largest_ref, total_ref, *kept = refs[number:]
    heads, block = cache_refs[0].shape[1:3] if by_head else cache_refs[0].shape[2:0:-1]
    r, i, j = (pl.program_id(axis) for axis in range(3))
    first_query = starts[r] + i * tile
    first_key = j * (block * stride) + cache_at[1]

    def of_head(g: int) -> list[Array]:
        """Keys and values (block, K), and their scales (1, block) in float32."""
        pair = [ref[0, g] if by_head else ref[0, :, g, :] for ref in cache_refs[:2]]
        return pair + [ref[0, g : g + 1].astype(jnp.float32) for ref in cache_refs[2:]]

    def add(g: Any, seen: Array, k: Array, v: Array, of_keys: Any = 1, of_values: Any = 1) -> None:
        q = q_ref[0, 0, g]
        scores = lax.dot_general(q, k.astype(q.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores * of_keys, -jnp.inf)
        old = largest_ref[g]
        new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
        share = jnp.exp(old - new)
        probs = jnp.exp(scores - new[:, :1])
        largest_ref[g] = new
        total_ref[g] = total_ref[g] * share + probs.sum(axis=1, keepdims=True)
        probs = (probs * of_values).astype(q.dtype)
        more = lax.dot_general(probs, v.astype(q.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        out_ref[0, 0, g] = out_ref[0, 0, g] * share[:, :1] + more

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(first_key < first_query + tile)
    def _():
        shape = (q_ref.shape[3], block)
        key = first_key + lax.broadcasted_iota(jnp.int32, shape, 1) * stride
        query = first_query + (lax.broadcasted_iota(jnp.int32, shape, 0) & (tile - 1))
        seen = key <= query
        for g in range(heads):
            for ref, x in zip(kept, of_head(g), strict=False):
                ref[g] = x
            if not kept:
                add(g, seen, *of_head(g))
        if kept:
            lax.fori_loop(0, heads, lambda g, none: add(g, seen, *(ref[g] for ref in kept)), None)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        lane = lax.broadcasted_iota(jnp.int32, stats_ref.shape[2:], 2)
        stats_ref[0, 0] = jnp.where(lane == 0, largest_ref[...], total_ref[...])


def cache_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    starts: Int[Array, "R"],
    first_row: Int[Array, ""] | int,
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    scales: tuple[Float[Array, "B G S"], Float[Array, "B G S"]] | None = None,
) -> tuple[Array, Array, Array]:
    """Attention of queries at positions starts[r] … starts[r] + T - 1 of row first_row + r to positions up to theirs.

    Args:
      context_shard: (x, X) where the cache holds every X-th position from x on.
      scales: of the keys and the values of an int8 cache.

    Returns:
      Largest score and sum of exp(score - largest), (R, T, H), and the values' sum with these weights, (R, T, H, K).
    """
    R, T, H, K = query.shape
    G, S = key.shape[1:3]
    tile, block = tile_of(T), block_of(S)
    tiles, rows, stride = T // tile, H // G * tile, context_shard[1]
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q = q.reshape(R, tiles, tile, H, K).swapaxes(2, 3).reshape(R, tiles, G, rows, K)
    starts = starts.astype(jnp.int32)
    cache_at = jnp.stack([jnp.asarray(first_row, jnp.int32), jnp.asarray(context_shard[0], jnp.int32)])
    blocks = _last_block(jnp.max(starts) + T - 1, cache_at[1], stride, block) + 1

    def q_index(r, i, j, starts, cache_at):
        return r, i, 0, 0, 0

    def kv_index(r, i, j, starts, cache_at):
        last = _last_block(starts[r] + (i + 1) * tile - 1, cache_at[1], stride, block)
        return cache_at[0] + r, 0, jnp.minimum(j, last), 0

    def as_it_lies(r, i, j, starts, cache_at):
        row, _, place, _ = kv_index(r, i, j, starts, cache_at)
        return row, place, 0, 0

    def scale_index(*at):
        return kv_index(*at)[:3]

    by_head = is_stored_by_head(G, key.dtype)  # in its stored layout: a transpose would copy it
    kv = pl.BlockSpec((1, G, block, K), kv_index) if by_head else pl.BlockSpec((1, block, G, K), as_it_lies)
    scale = pl.BlockSpec((1, G, block), scale_index)
    apart = [pltpu.VMEM((G, block, K), key.dtype)] * 2 + [pltpu.VMEM((G, 1, block), jnp.float32)] * (2 * bool(scales))
    apart = apart if tile > 1 else []
    key, value = (in_hbm(x if by_head else x.swapaxes(1, 2)) for x in (key, value))
    out, stats = pl.pallas_call(
        functools.partial(_kernel, tile=tile, stride=stride, by_head=by_head, scaled=scales is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(R, tiles, blocks),
            in_specs=[pl.BlockSpec((1, 1, G, rows, K), q_index), kv, kv, *([scale] * 2 if scales else [])],
            out_specs=[pl.BlockSpec((1, 1, G, rows, n), q_index) for n in (K, LANES)],
            scratch_shapes=[pltpu.VMEM((G, rows, LANES), jnp.float32)] * 2 + apart,
        ),
        out_shape=[jax.ShapeDtypeStruct((R, tiles, G, rows, n), jnp.float32) for n in (K, LANES)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        name="cache_attention",
    )(starts, cache_at, q, key, value, *(scales or ()))

    def by_token(x: Array) -> Array:
        rest = x.shape[4:]
        return x.reshape(R, tiles, H, tile, *rest).swapaxes(2, 3).reshape(R, T, H, *rest)

    return by_token(stats[..., 0]), by_token(stats[..., 1]), by_token(out)
