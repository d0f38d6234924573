"""Attention to the key-value cache on TPUs: scores stay in VMEM, and only positions in use are read.

One kernel serves chunked prefill and decode steps. A grid step reads one block of positions of all heads for a tile of
queries of one row. Blocks that no query of the tile sees repeat the index of the last visible one, so that nothing is
copied for them.
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
from dbrx_jax.kernels.tpu.packed_weights import LANES, MAX_VMEM, in_hbm, iota
from dbrx_jax.ops.attention import MASKED

QUERY_TILE = 128  # tokens
BLOCK = 512  # positions


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (R, T, H, K) and a cache (B, G, S, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[2]
    floats = query.dtype in (jnp.bfloat16, jnp.float32) and key.dtype in (query.dtype, jnp.int8)
    return floats and key.dtype == value.dtype and K == LANES and S % LANES == 0 and (T == 1 or T % QUERY_TILE == 0)


def _tile_sizes(query: Any, key: Any) -> tuple[int, int]:
    """Returns the queries of a tile, a power of two, and the positions of a block."""
    return min(query.shape[1], QUERY_TILE), math.gcd(key.shape[2], BLOCK)


def hbm_bytes(query: Any, key: Any, starts: np.ndarray, context_shard: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Returns the bytes that the kernel reads and writes for queries (R, T, H, K) and a cache (B, G, S, K).

    Transposing the queries and the result is not included.
    """
    R, T, H, K = query.shape
    G, (tile, block), (offset, stride) = key.shape[1], _tile_sizes(query, key), context_shard
    last_queries = starts[:, None] + (np.arange(T // tile) + 1) * tile - 1  # of each tile
    blocks = np.maximum(last_queries - offset, 0) // (block * stride) + 1
    num_copies = blocks.sum() - (blocks[:, :-1] == 1).sum()  # the only block of a tile stays for the next tile
    position_bytes = G * (K * key.dtype.itemsize + (2 if key.dtype == jnp.int8 else 0))
    num_queries = R * T * H
    read = 2 * num_copies * block * position_bytes + num_queries * K * query.dtype.itemsize
    return int(read), num_queries * (K + LANES) * 4


def _last_block(last_query: Array, offset: Array, stride: int, block: int) -> Array:
    """Returns the last block with a position that a query at `last_query` sees, or 0 if it sees none."""
    return lax.div(jnp.maximum(last_query - offset, 0), jnp.int32(block * stride))


def _add_head(q_ref, out_ref, largest_ref, total_ref, g, visible, arrays) -> None:
    """Adds a head's keys and values (block, K), and their scales (1, block) if they are int8, to its online softmax."""
    k, v, key_scales, value_scales = arrays if len(arrays) == 4 else (*arrays, 1, 1)
    q = q_ref[0, 0, g]
    scores = lax.dot_general(q, k.astype(q.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * key_scales, -jnp.inf)
    old_largest = largest_ref[g]
    largest = jnp.maximum(old_largest, scores.max(axis=1, keepdims=True))
    rescale = jnp.exp(old_largest - largest)
    probs = jnp.exp(scores - largest[:, :1])
    largest_ref[g] = largest
    total_ref[g] = total_ref[g] * rescale + probs.sum(axis=1, keepdims=True)
    probs = (probs * value_scales).astype(q.dtype)
    out = lax.dot_general(probs, v.astype(q.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    out_ref[0, 0, g] = out_ref[0, 0, g] * rescale[:, :1] + out


def _kernel(starts, row_and_offset, q_ref, *refs, tile: int, stride: int, by_head: bool, scaled: bool):
    """Adds a block of positions, in the cache's memory layout, to the softmax of queries (1, 1, G, H/G tile, K).

    Queries are ordered by head, then position. A tile of many queries loops over the heads: unrolled, Mosaic takes ten
    seconds a layer to compile. A loop's index is dynamic, and the heads of a stored block can only be indexed
    statically, so the block is first copied by head; that takes little time beside the matmuls. A single query unrolls.
    """
    num_cache = 4 if scaled else 2
    cache_refs = refs[:num_cache]  # keys, values and their scales
    out_ref, stats_ref, largest_ref, total_ref, *copy_refs = refs[num_cache:]
    heads, block = cache_refs[0].shape[1:3] if by_head else cache_refs[0].shape[2:0:-1]
    r, i, j = (pl.program_id(axis) for axis in range(3))
    first_query = starts[r] + i * tile
    first_key = j * (block * stride) + row_and_offset[1]
    add_head = functools.partial(_add_head, q_ref, out_ref, largest_ref, total_ref)

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(first_key < first_query + tile)
    def _():
        shape = (q_ref.shape[3], block)
        visible = first_key + iota(shape, 1) * stride <= first_query + (iota(shape, 0) & (tile - 1))
        for g in range(heads):
            arrays = [ref[0, g] if by_head else ref[0, :, g, :] for ref in cache_refs[:2]]
            arrays += [ref[0, g : g + 1].astype(jnp.float32) for ref in cache_refs[2:]]
            if not copy_refs:
                add_head(g, visible, arrays)
            for ref, x in zip(copy_refs, arrays, strict=False):
                ref[g] = x
        if copy_refs:
            lax.fori_loop(0, heads, lambda g, _: add_head(g, visible, [ref[g] for ref in copy_refs]), None)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        stats_ref[0, 0] = jnp.where(iota(stats_ref.shape[2:], 2) == 0, largest_ref[...], total_ref[...])


def cache_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    starts: Int[Array, "R"],
    first_row: Int[Array, ""] | int,
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    scales: tuple[Float[Array, "B G S"], Float[Array, "B G S"]] | None = None,
) -> tuple[Array, Array, Array]:
    """Attends from positions starts[r] … starts[r] + T - 1 of row first_row + r to the positions up to each query's.

    Args:
      context_shard: (x, X) if the cache stores every X-th position from x on.
      scales: scales of the keys and of the values of an int8 cache.

    Returns:
      Largest score and sum of exp(score - largest), (R, T, H), and the values' sum with these weights, (R, T, H, K).
    """
    R, T, H, K = query.shape
    G, (tile, block), stride = key.shape[1], _tile_sizes(query, key), context_shard[1]
    num_tiles = T // tile
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q = q.reshape(R, num_tiles, tile, H, K).swapaxes(2, 3).reshape(R, num_tiles, G, H // G * tile, K)
    starts = starts.astype(jnp.int32)
    row_and_offset = jnp.stack([jnp.asarray(first_row, jnp.int32), jnp.asarray(context_shard[0], jnp.int32)])
    num_blocks = _last_block(jnp.max(starts) + T - 1, row_and_offset[1], stride, block) + 1
    by_head = is_stored_by_head(G, key.dtype)
    if not by_head:  # its memory layout: the transpose is free, and without it XLA copies the cache
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    out, stats = pl.pallas_call(
        functools.partial(_kernel, tile=tile, stride=stride, by_head=by_head, scaled=scales is not None),
        grid_spec=_grid_spec(q, key.dtype, tile, block, stride, num_blocks, scales is not None),
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:4], n), jnp.float32) for n in (K, LANES)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MAX_VMEM),
        name="cache_attention",
    )(starts, row_and_offset, q, in_hbm(key), in_hbm(value), *(scales or ()))

    def by_token(x: Array) -> Array:
        rest = x.shape[4:]
        return x.reshape(R, num_tiles, H, tile, *rest).swapaxes(2, 3).reshape(R, T, H, *rest)

    return by_token(stats[..., 0]), by_token(stats[..., 1]), by_token(out)


def _grid_spec(
    q: Array, key_dtype: jnp.dtype, tile: int, block: int, stride: int, num_blocks: Array, scaled: bool
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid (rows, tiles of queries, blocks of positions), for q (R, T / tile, G, H/G tile, K)."""
    R, num_tiles, G, q_rows, K = q.shape

    def row_and_block(r, i, j, starts, row_and_offset):
        last = _last_block(starts[r] + (i + 1) * tile - 1, row_and_offset[1], stride, block)
        return row_and_offset[0] + r, jnp.minimum(j, last)

    def by_head_index(*step):
        row, position_block = row_and_block(*step)
        return row, 0, position_block, 0

    if is_stored_by_head(G, key_dtype):
        cache_spec = pl.BlockSpec((1, G, block, K), by_head_index)
    else:
        cache_spec = pl.BlockSpec((1, block, G, K), lambda *step: (*row_and_block(*step), 0, 0))
    scale_specs = [pl.BlockSpec((1, G, block), lambda *step: by_head_index(*step)[:3])] * (2 if scaled else 0)
    query_specs = [pl.BlockSpec((1, 1, G, q_rows, n), lambda r, i, *_: (r, i, 0, 0, 0)) for n in (K, LANES)]
    scratch = [pltpu.VMEM((G, q_rows, LANES), jnp.float32)] * 2
    if tile > 1:
        scratch += [pltpu.VMEM((G, block, K), key_dtype)] * 2
        scratch += [pltpu.VMEM((G, 1, block), jnp.float32)] * len(scale_specs)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(R, num_tiles, num_blocks),
        in_specs=[query_specs[0], cache_spec, cache_spec, *scale_specs],
        out_specs=query_specs,
        scratch_shapes=scratch,
    )
