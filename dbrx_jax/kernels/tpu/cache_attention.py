"""Attention to the paged key-value cache on TPUs: scores stay in VMEM, and only blocks in use are read.

One kernel serves chunked prefill and decode steps. A step of its grid attends from a tile of queries of one row. It
copies the blocks that a query of the tile sees, GROUP at a time, and no others. Meanwhile it works on those before. The
last group of a step overlaps with the first of the next.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.cache_layout import is_stored_by_head
from dbrx_jax.kernels.tpu.cache_blocks import Blocks, ChunkScratch, Softmax, add_to_chunk, add_to_token, chunk_rows
from dbrx_jax.kernels.tpu.packed_weights import LANES, MAX_VMEM, in_hbm, iota
from dbrx_jax.ops.attention import MASKED

QUERY_TILE = 128  # most tokens of a tile
MIN_TILE = 32  # tokens; but for a single one
GROUP = 4  # blocks that are copied, and multiplied, together


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (R, T, H, K) and a cache (N, G, P, K), arrays or shapes."""
    T, K, (G, P) = query.shape[1], query.shape[3], key.shape[1:3]
    floats = query.dtype in (jnp.bfloat16, jnp.float32) and key.dtype in (query.dtype, jnp.int8)
    sizes = K == P == LANES and G & (G - 1) == 0 and (T == 1 or T % MIN_TILE == 0)
    return floats and key.dtype == value.dtype and sizes


def _tile_size(query: Any) -> int:
    """Returns the queries of a tile, a power of two."""
    return math.gcd(query.shape[1], QUERY_TILE)


def hbm_bytes(query: Any, key: Any, starts: np.ndarray, context_shard: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Returns the bytes that the kernel reads and writes for queries (R, T, H, K) and a cache (N, G, P, K).

    Transposing the queries and the result is not included.
    """
    R, T, H, K = query.shape
    (G, P), tile, (offset, stride) = key.shape[1:3], _tile_size(query), context_shard
    last_queries = starts[:, None] + (np.arange(T // tile) + 1) * tile - 1  # of each tile
    blocks = (last_queries - offset + P * stride) // (P * stride)
    kept = np.where(blocks[:, :-1] <= GROUP, blocks[:, :-1], 0)  # for the next tile
    position_bytes = G * (K * key.dtype.itemsize + (2 if key.dtype == jnp.int8 else 0))
    num_queries = R * T * H
    read = 2 * (blocks.sum() - kept.sum()) * P * position_bytes + num_queries * K * query.dtype.itemsize
    num_sets = 1 if T == 1 else G
    stats = R * (T // tile) * num_sets * 2 * -(-H * tile // (num_sets * LANES)) * LANES
    return int(read), num_queries * K * (4 if T == 1 else query.dtype.itemsize) + stats * 4


class _Sizes(NamedTuple):
    """Sizes that are constants of the kernel."""

    heads: int  # G
    tile: int  # queries
    num_tiles: int  # of a row
    stride: int  # between the positions of this device
    by_head: bool  # the order in a block, as in cache_blocks.Blocks


class _Rows(NamedTuple):
    """Rows of queries, and where their blocks are; a step is a tile of a row."""

    starts: Any  # position of each row's first query, in SMEM as all arrays here
    offset: Any  # first position of this device
    table: Any  # of all rows, (R W)
    sizes: _Sizes

    def last_query(self, step: Array) -> Array:
        row, tile = lax.div(step, self.sizes.num_tiles), lax.rem(step, self.sizes.num_tiles)
        return self.starts[row] + (tile + 1) * self.sizes.tile - 1

    @property
    def width(self) -> int:
        return self.table.shape[0] // self.starts.shape[0]

    def num_blocks(self, step: Array) -> Array:
        """Returns the number of blocks that the step's queries see, which may be 0; padding may be past the table."""
        block = LANES * self.sizes.stride
        return jnp.minimum(lax.div(self.last_query(step) - self.offset[0] + block, block), self.width)

    def block(self, step: Array, index: Array) -> Array:
        return self.table[lax.div(step, self.sizes.num_tiles) * self.width + index]


class _Place(NamedTuple):
    """A group of a step's blocks, and its slot of the buffers."""

    step: Array
    group: Array
    slot: Array
    kept: Array  # number of its blocks that the step before left in the slot


class _Copies(NamedTuple):
    """Copies of blocks from HBM."""

    pools: list[Any]  # keys, values and their scales, (N, …)
    buffers: list[Any]  # in VMEM, (2, GROUP, …)
    semaphores: Any  # (2, GROUP)

    def start(self, rows: _Rows, place: _Place) -> None:
        self._for_each(rows, place, lambda copy: copy.start())

    def wait(self, rows: _Rows, place: _Place) -> None:
        self._for_each(rows, place, lambda copy: copy.wait())

    def _for_each(self, rows: _Rows, place: _Place, action: Callable[[Any], None]) -> None:
        first = place.group * GROUP
        num = rows.num_blocks(place.step) - first
        for b in range(GROUP):

            @pl.when((place.kept <= b) & (b < num))
            def _(b=b):
                block = rows.block(place.step, first + b)
                for pool, buffer in zip(self.pools, self.buffers, strict=True):
                    target, semaphore = buffer.at[place.slot, b], self.semaphores.at[place.slot, b]
                    action(pltpu.make_async_copy(pool.at[block], target, semaphore))


def _kernel(
    starts, offset, table, q_ref, pools, out_ref, stats_ref, sums_ref, largest_ref, total_ref, buffers, semaphores,
    state, scratch, *, sizes,
):  # fmt: skip
    """Computes a tile's partial attention; `state` is the slot of its first group, and `kept` there."""
    rows, copies = _Rows(starts, offset, table, sizes), _Copies(pools, buffers, semaphores)
    softmax = Softmax(q_ref.at[0], sums_ref, largest_ref, total_ref)
    step = pl.program_id(0)
    num_blocks, last_query = rows.num_blocks(step), rows.last_query(step)
    num_groups = jnp.maximum(pl.cdiv(num_blocks, GROUP), 1)

    @pl.when(step == 0)
    def _():
        state[0], state[1] = 0, 0
        copies.start(rows, _Place(step, 0, 0, 0))

    def reset(s, _):  # a loop over sets, which compiles faster than all of them at once
        for ref, value in ((sums_ref, 0), (largest_ref, MASKED), (total_ref, 0)):
            ref[s] = jnp.full(ref.shape[1:], value, ref.dtype)

    lax.fori_loop(0, sums_ref.shape[0], reset, None)

    def add_blocks(num: int, group: Array, slot: Array) -> None:
        first_key = group * (GROUP * LANES * sizes.stride) + offset[0]
        seen = lax.div(last_query - first_key, sizes.stride) + 1
        seen = jnp.minimum(seen, (num_blocks - group * GROUP) * LANES)  # not what is behind them in the buffers
        blocks = Blocks([buffer.at[slot] for buffer in buffers], seen, sizes.heads, sizes.by_head)
        if sizes.tile == 1:
            add_to_token(softmax, blocks, num)
            return
        shape = (chunk_rows(softmax.query), num * LANES)
        query = last_query - sizes.tile + 1 + (iota(shape, 0) & (sizes.tile - 1))
        last_seen = first_key + (seen - 1) * sizes.stride
        visible = first_key + iota(shape, 1) * sizes.stride <= jnp.minimum(query, last_seen)
        add_to_chunk(softmax, blocks, num, scratch, lambda scores: jnp.where(visible, scores, -jnp.inf))

    def process_group(group: Array, slot_and_kept: tuple[Array, Array]) -> tuple[Array, Array]:
        place = _Place(step, group, *slot_and_kept)
        is_last = group == num_groups - 1
        # The next tile of the row sees these blocks too. If the buffer has all, only those that it lacks are copied.
        keeps = is_last & (group == 0) & (lax.rem(step + 1, sizes.num_tiles) != 0)
        following = _Place(
            jnp.where(is_last, step + 1, step),
            jnp.where(is_last, 0, group + 1),
            jnp.where(keeps, place.slot, 1 - place.slot),
            jnp.where(keeps, num_blocks, 0),
        )
        pl.when(following.step < pl.num_programs(0))(lambda: copies.start(rows, following))
        copies.wait(rows, place)
        num = jnp.minimum(num_blocks - group * GROUP, GROUP)
        # A tile of queries takes long to compile, so it has no code for 2 or 3 blocks: it masks the rest of the group.
        sizes_with_code = range(1, GROUP + 1) if sizes.tile == 1 else (1, GROUP)
        for smaller, n in zip((0, *sizes_with_code), sizes_with_code, strict=False):
            pl.when((smaller < num) & (num <= n))(functools.partial(add_blocks, n, group, place.slot))
        return following.slot, following.kept

    state[0], state[1] = lax.fori_loop(0, num_groups, process_group, (state[0], state[1]))

    def store(s, _):
        out_ref[0, s] = sums_ref[s].astype(out_ref.dtype)
        for i, ref in enumerate((largest_ref, total_ref)):
            for first in range(0, ref.shape[1], LANES):
                values = ref[s, first : first + LANES]  # the same in each lane
                own_lane = iota(values.shape, 1) == iota(values.shape, 0)
                stats_ref[0, s, i, first // LANES] = jnp.where(own_lane, values, 0).sum(axis=0)

    lax.fori_loop(0, sums_ref.shape[0], store, None)


def cache_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "N G P K"],
    value: Float[Array, "N G P K"],
    starts: Int[Array, "R"],
    table: Int[Array, "R W"],
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    scales: tuple[Float[Array, "N G P"], Float[Array, "N G P"]] | None = None,
) -> tuple[Array, Array, Array]:
    """Attends from positions starts[r] … starts[r] + T - 1 of row r to the positions up to each query's.

    Args:
      table: the numbers of each row's blocks. It is in SMEM, which has 1 MiB.
      context_shard: (x, X) if local position i is position i X + x.
      scales: scales of the keys and of the values of an int8 cache.

    Returns:
      Largest score and sum of exp(score - largest), (R, T, H), and the values' sum with these weights, (R, T, H, K):
      computed in float32, and of a chunk rounded to the query's dtype.
    """
    R, T, H, K = query.shape
    G, tile = key.shape[1], _tile_size(query)
    num_tiles, num_sets = T // tile, 1 if T == 1 else G
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q = q.reshape(R, num_tiles, tile, H, K).swapaxes(2, 3).reshape(R * num_tiles, num_sets, -1, K)
    sizes = _Sizes(G, tile, num_tiles, context_shard[1], is_stored_by_head(G, key.dtype))
    if not sizes.by_head:  # its memory layout: the transpose is free, and without it XLA copies the cache
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    out_dtype = jnp.float32 if T == 1 else q.dtype  # a chunk's sums go through HBM, several times on a mesh
    pools = [in_hbm(x) for x in (*(x.reshape(x.shape[0], -1, K) for x in (key, value)), *(scales or ()))]
    out, stats = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=_grid_spec(q, pools, sizes),
        out_shape=[jax.ShapeDtypeStruct(q.shape, out_dtype), jax.ShapeDtypeStruct(_stats_shape(q), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MAX_VMEM),
        name="cache_attention",
    )(starts.astype(jnp.int32), _vector(context_shard[0]), _vector(table), q, pools)

    def by_token(x: Array) -> Array:
        rest = x.shape[3:]
        return x.reshape(R, num_tiles, H, tile, *rest).swapaxes(2, 3).reshape(R, T, H, *rest)

    stats = stats.reshape(*stats.shape[:3], -1)[..., : q.shape[2]]  # (steps, sets, 2, rows)
    return by_token(stats[:, :, 0]), by_token(stats[:, :, 1]), by_token(out)


def _stats_shape(q: Array) -> tuple[int, ...]:
    """Returns the shape of the largest scores and sums of queries (steps, sets, rows, K), LANES rows in a vector."""
    return *q.shape[:2], 2, pl.cdiv(q.shape[2], LANES), LANES


def _vector(x: Array | int) -> Array:
    return jnp.asarray(x, jnp.int32).reshape(-1)  # in SMEM a matrix would be padded


def _grid_spec(q: Array, pools: list[Array], sizes: _Sizes) -> pltpu.PrefetchScalarGridSpec:
    """Returns a grid of steps for q (steps, sets, rows, K), with the kernel's buffers."""
    num_steps, num_sets, num_rows, K = q.shape
    key_dtype, *scales = pools[0].dtype, *pools[2:]
    scratch: list[Any] = [pltpu.VMEM((num_sets, num_rows, n), jnp.float32) for n in (K, LANES, LANES)]
    scratch += [[pltpu.VMEM((2, GROUP, *x.shape[1:]), x.dtype) for x in pools]]
    scratch += [pltpu.SemaphoreType.DMA((2, GROUP)), pltpu.SMEM((2,), jnp.int32)]
    if sizes.tile > 1:
        num_words = pools[0].shape[1] * key_dtype.itemsize // 4
        is_packed = key_dtype.itemsize < 4 and not sizes.by_head
        arrays = [pltpu.VMEM((sizes.heads, GROUP * LANES, K), q.dtype)] * 2
        arrays += [pltpu.VMEM((sizes.heads, 1, GROUP * LANES), jnp.float32)] * len(scales)
        scratch += [ChunkScratch(pltpu.VMEM((num_words, K), jnp.int32) if is_packed else None, arrays)]
    else:
        scratch += [None]
    query_spec = pl.BlockSpec((1, *q.shape[1:]), lambda step, *_: (step, 0, 0, 0))
    stats_spec = pl.BlockSpec((1, *_stats_shape(q)[1:]), lambda step, *_: (step, 0, 0, 0, 0))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(num_steps,),
        in_specs=[query_spec, [pl.BlockSpec(memory_space=pl.ANY)] * len(pools)],
        out_specs=[query_spec, stats_spec],
        scratch_shapes=scratch,
    )
