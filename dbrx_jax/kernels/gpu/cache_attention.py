"""Flash attention over the paged key-value cache on Hopper GPUs, for prefill chunks and for decoding.

A warp group computes a tile of up to 64 queries that share a key and value head: positions of one query head in
prefill, query heads of one position in decoding. It streams blocks of 64 live positions through a ring of buffers in
shared memory, with an online softmax. A block is a part of a cache block; the table of the row's cache blocks is read
ahead of the copies. In decoding a row's live blocks are split among several warp groups, whose partial results XLA
merges. The warp group that has the last block may also write the row's new key and value into the cache.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

MASKED = -1e30
ROWS = 64  # queries of a wgmma; with fewer, the rest are unused
BLOCK = 64  # positions
BUFFERS = {2: 3, 1: 5}  # blocks of keys, and of values, in shared memory, by bytes of an element
WARP_GROUPS = 264  # in decoding at least, two for each multiprocessor; of rows of different lengths some end early
WARP_GROUPS_FOR_ONE_ROW = 132  # at most: shared memory is enough for one on a multiprocessor at a time
MAX_UNROLLED_SPLITS = 16  # XLA merges so many in one kernel
SWIZZLE = 128  # bytes
_load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run this kernel


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (R, T, H, K) and a cache (N, G, P, K), arrays or shapes."""
    T, H, K = query.shape[1:]
    G, P = key.shape[1:3]
    dtypes = query.dtype == jnp.bfloat16 and key.dtype == value.dtype and key.dtype in (jnp.bfloat16, jnp.int8)
    queries = H // G <= ROWS if T == 1 else T % ROWS == 0
    return dtypes and queries and K == 128 and P % BLOCK == 0


class Shape(NamedTuple):
    """Sizes that the kernel is compiled for.

    Attributes:
      rows: queries per tile, a multiple of 8.
      tiles: number of query tiles per unit.
      units: number of query heads (prefill) or groups of query heads (decoding).
      kv_heads: number of key and value heads.
      splits: number of warp groups that share a tile's live blocks.
      stride: distance of consecutive cache positions, the number of context shards.
      scaled: the cache is int8 with scales.
      buffers: blocks in the ring.
      prefill: a tile's queries are at successive positions, instead of all at one.
      new: the tile's row with the new key, before that of the new value; None if the cache has them already.
    """

    rows: int
    tiles: int
    units: int
    kv_heads: int
    head_dim: int
    splits: int
    stride: int
    scaled: bool
    buffers: int
    prefill: bool
    new: int | None


def _shape(query: Any, key: Any, stride: int, writes: bool = False) -> Shape:
    R, T, H, K = query.shape
    G, itemsize, prefill = key.shape[1], jnp.dtype(key.dtype).itemsize, T > 1
    if prefill:
        rows, tiles, units, splits = ROWS, T // ROWS, H, 1
    else:
        rows, tiles, units = -(-(H // G + 2 * writes) // 8) * 8, 1, G
        splits = max(1, WARP_GROUPS_FOR_ONE_ROW // G) if R == 1 else -(-WARP_GROUPS // (R * G))
    new = H // G if writes else None
    return Shape(rows, tiles, units, G, K, splits, stride, itemsize == 1, BUFFERS[itemsize], prefill, new)


def cache_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "N G P K"],
    value: Float[Array, "N G P K"],
    starts: Int[Array, "R"],
    table: Int[Array, "R W"],
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    scales: tuple[Float[Array, "N G P"], Float[Array, "N G P"]] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Computes partial causal attention of row r's queries at positions starts[r] + arange(T) over blocks table[r].

    Args:
      table: the numbers of each row's cache blocks; blocks behind the last that a query sees are not read.
      context_shard: (x, X) if the cache holds positions x, x + X, x + 2 X and so on.
      scales: of the keys and the values of an int8 cache.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.

    Returns:
      The maximum score and the sum of exp(score - maximum), (R, T, H), and the values' sum with these weights,
      (R, T, H, K), in float32.
    """
    R, T, _, K = query.shape
    shape = _shape(query, key, context_shard[1])
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q = q.swapaxes(1, 2) if T > 1 else _tile_rows(shape, q)
    scalars = jnp.concatenate([jnp.int32(context_shard[0])[None], starts.astype(jnp.int32)])
    with jax.named_scope("cache_attention"):  # planning.hlo knows it by this name
        out, stats = _build_kernel(shape, R, interpret)(
            scalars, table.astype(jnp.int32), q, key, value, *(scales or ())
        )
    return _results(query, shape, out, stats)


def write_and_attend(
    query: Float[Array, "R 1 H K"],
    new_key: Float[Array, "R 1 G K"],
    new_value: Float[Array, "R 1 G K"],
    key: Float[Array, "N G P K"],
    value: Float[Array, "N G P K"],
    positions: Int[Array, "R"],
    valid: Bool[Array, "R"],
    table: Int[Array, "R W"],
    interpret: Any = None,
) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """Writes each row's new key and value at its position of the cache, and computes :func:`cache_attention`.

    Args:
      valid: False for padding, which is not written, and gets finite but arbitrary results.

    Returns:
      The results of :func:`cache_attention`, and the pools, in place if the program may reuse their buffers.
    """
    R, K = query.shape[0], query.shape[3]
    shape = _shape(query, key, 1, writes=True)
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    rows = _tile_rows(shape, q, new_key.astype(key.dtype), new_value.astype(key.dtype))
    scalars = jnp.concatenate([jnp.zeros(1, jnp.int32), positions.astype(jnp.int32), valid.astype(jnp.int32)])
    key_ref, value_ref = jax.new_ref(key), jax.new_ref(value)
    with jax.named_scope("cache_attention"):
        out, stats = _build_kernel(shape, R, interpret)(scalars, table.astype(jnp.int32), rows, key_ref, value_ref)
    return _results(query, shape, out, stats), jax.freeze(key_ref), jax.freeze(value_ref)


def _tile_rows(shape: Shape, *parts: Float[Array, "R 1 _ K"]) -> Float[Array, "R G rows K"]:
    """Returns the parts of each key and value head one after another, as rows of its tile."""
    R, K, G = parts[0].shape[0], shape.head_dim, shape.kv_heads
    rows = jnp.concatenate([x.reshape(R, G, -1, K) for x in parts], axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, shape.rows - rows.shape[2]), (0, 0)))


def _results(query: Any, shape: Shape, out: Array, stats: Array) -> tuple[Array, Array, Array]:
    """Merges the splits of the kernel's results; returns them as :func:`cache_attention` does."""
    R, T, H, K = query.shape
    maximum, total, out = _merge_splits(stats[..., 0, :], stats[..., 1, :], out)
    if T > 1:
        return maximum.swapaxes(1, 2), total.swapaxes(1, 2), out.swapaxes(1, 2)
    maximum, total, out = (x[:, :, : H // shape.kv_heads] for x in (maximum, total, out))
    return maximum.reshape(R, 1, H), total.reshape(R, 1, H), out.reshape(R, 1, H, K)


def hbm_bytes(query: Any, key: Any, starts: np.ndarray, context_shard: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Returns the bytes that a call's kernel reads and writes, for queries (R, T, H, K) and a cache (N, G, P, K).

    XLA's operations around the kernel, and reads of the table, are not counted. Reads of the cache are counted for each
    head and query tile, though in prefill most of them come from the L2 cache.
    """
    shape, (offset, stride) = _shape(query, key, context_shard[1]), context_shard
    last = starts[:, None] + (np.arange(shape.tiles) + 1) * shape.rows - 1 if shape.prefill else starts[:, None]
    num_blocks = -(-((last - offset + stride) // stride) // BLOCK)
    position_bytes = shape.head_dim * key.dtype.itemsize + 2 * shape.scaled
    num_queries = len(starts) * shape.units * shape.splits * shape.tiles * shape.rows
    read = 2 * num_blocks.sum() * shape.units * BLOCK * position_bytes + num_queries * shape.head_dim * 2
    return int(read), num_queries * (shape.head_dim + 2) * 4


def _merge_splits(maximum: Array, total: Array, out: Array) -> tuple[Array, Array, Array]:
    """Merges partial softmax results (R, units, splits, tiles, rows) to (R, units, tiles * rows)."""
    splits = maximum.shape[2]
    if splits > MAX_UNROLLED_SPLITS:
        merged_maximum = maximum.max(axis=2)
        scale = jnp.exp(maximum - merged_maximum[:, :, None])
        total, out = (total * scale).sum(axis=2), (out * scale[..., None]).sum(axis=2)
    else:
        merged_maximum = functools.reduce(jnp.maximum, [maximum[:, :, s] for s in range(splits)])
        scales = [jnp.exp(maximum[:, :, s] - merged_maximum) for s in range(splits)]
        totals = [total[:, :, s] * scale for s, scale in enumerate(scales)]
        outs = [out[:, :, s] * scale[..., None] for s, scale in enumerate(scales)]
        total, out = sum(totals[1:], totals[0]), sum(outs[1:], outs[0])
    maximum, total, out = (x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (merged_maximum, total, out))
    return maximum, total, out


def _build_kernel(shape: Shape, rows: int, interpret: Any) -> Any:
    """Builds the kernel, a function of (context shard, starts, valid), table, queries, keys, values and scales."""
    swizzled = plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE)
    K, ring, block = shape.head_dim, shape.buffers, (BLOCK, shape.head_dim)
    scratch: dict[str, Any] = {
        "q": plgpu.SMEM((ROWS, K), jnp.bfloat16, transforms=swizzled),
        "out": plgpu.SMEM((ROWS, K), jnp.float32),
        "stats": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_barrier": plgpu.Barrier(),
    }
    for name in "kv":
        floats = plgpu.SMEM(block if shape.scaled else (ring, *block), jnp.bfloat16, transforms=swizzled)
        scratch |= {name: floats, f"{name}_barrier": plgpu.Barrier(num_barriers=ring, num_arrivals=1 + shape.scaled)}
        if shape.scaled:
            scratch[f"{name}_int8"] = plgpu.SMEM((ring, *block), jnp.int8)
            scratch[f"{name}_scale"] = plgpu.SMEM((ring, BLOCK), jnp.bfloat16)
    if shape.new is not None:
        scratch |= {"new": plgpu.SMEM((2, K), jnp.bfloat16), "new_barrier": plgpu.Barrier()}
    if interpret:
        scratch["probs"] = plgpu.SMEM((ROWS, BLOCK), jnp.bfloat16, transforms=swizzled)
    out_shape = rows, shape.units, shape.splits, shape.tiles
    return plgpu.kernel(
        functools.partial(_kernel, shape),
        out_type=[
            jax.ShapeDtypeStruct((*out_shape, shape.rows, K), jnp.float32),
            jax.ShapeDtypeStruct((*out_shape, 2, shape.rows), jnp.float32),
        ],
        scratch_types=[scratch],
        grid=(shape.tiles * shape.splits, shape.units, rows),
        grid_names=("tile", "unit", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


class _Copies(NamedTuple):
    """Asynchronous copies of one row and head's blocks `begin` to `end` to the ring of buffers."""

    scratch: dict[str, Any]
    sources: dict[str, Any]
    table: Any  # (R, W)
    row: Array
    head: Array
    begin: Array
    end: Array
    num_live: Array  # positions before and at that of the tile's last query
    ring: int

    @property
    def parts(self) -> int:
        """Number of blocks in a cache block."""
        return self.sources["k"].shape[2] // BLOCK

    def slot(self, i: Array) -> Array:
        return lax.rem(i - self.begin, jnp.int32(self.ring))

    def find(self, i: Array) -> Array:
        """Returns the number of the cache block that has block i.

        It is any of the row's where only padding sees block i, which may be behind the table.
        """
        return self.table[self.row, lax.min(lax.div(i, jnp.int32(self.parts)), jnp.int32(self.table.shape[1] - 1))]

    def start(self, i: Array, number: Array) -> None:
        """Starts to copy block i of keys and values, and their scales, if i is less than `end`.

        Args:
          number: of its cache block.
        """

        @pl.when(i < self.end)
        def _():
            slot, first = self.slot(i), lax.rem(i, jnp.int32(self.parts)) * BLOCK
            block = number, self.head, pl.ds(first, BLOCK)
            for name in "kv":
                barrier = self.scratch[f"{name}_barrier"].at[slot]
                buffer = self.scratch.get(f"{name}_int8", self.scratch[name])
                plgpu.copy_gmem_to_smem(self.sources[name].at[block], buffer.at[slot], barrier)
                if (scale := f"{name}_scale") in self.sources:
                    plgpu.copy_gmem_to_smem(self.sources[scale].at[block], self.scratch[scale].at[slot], barrier)

    def wait(self, name: str, i: Array) -> tuple[Any, Array | None]:
        """Waits for block i of keys ("k") or values ("v"); returns it as bfloat16 in shared memory, and its scales."""
        slot = self.slot(i)
        plgpu.barrier_wait(self.scratch[f"{name}_barrier"].at[slot])
        if f"{name}_scale" not in self.sources:
            return self.scratch[name].at[slot], None
        values = _load(self.scratch[f"{name}_int8"].at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
        self.scratch[name][...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        scale = _load(self.scratch[f"{name}_scale"].at[slot], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return self.scratch[name], scale.astype(jnp.float32)

    def insert_new(self, name: str, i: Array, values: Any) -> None:
        """Puts the new key or value into the last live block i in shared memory, and zeros behind it.

        The block's earlier row may have left infinities or NaNs there. Times a probability of 0 they would be NaN.
        """
        last = self.num_live - i * BLOCK - 1

        @pl.when(last < BLOCK)
        def _():
            new = _load(self.scratch["new"].at["kv".index(name)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            position = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
            block = _load(values, layout=plgpu.Layout.WGMMA, optimized=False)
            block = jnp.where(position < last, block, 0)
            values[...] = jnp.where(position == last, lax.broadcast_in_dim(new, values.shape, [1]), block)
            plgpu.commit_smem()

    def write_new(self) -> None:
        """Copies the new key and value to the cache."""
        last = self.num_live - 1
        position = lax.rem(last, jnp.int32(self.sources["k"].shape[2]))
        number = self.find(lax.div(last, jnp.int32(BLOCK)))
        for n, name in enumerate("kv"):
            plgpu.copy_smem_to_gmem(self.scratch["new"].at[n], self.sources[name].at[number, self.head, position])

    def wait_for_values(self, i: Array) -> tuple[Any, Array | None]:
        """Waits for block i of values; returns it as `wait` does, with zeros at positions that no query sees.

        The block's earlier row may have left infinities or NaNs there. Times a probability of 0 they would be NaN.
        """
        values, scale = self.wait("v", i)
        num_live = self.num_live - i * BLOCK
        if "new" in self.scratch:
            self.insert_new("v", i, values)
            return values, None
        if scale is not None:  # integers are finite
            per_position = plgpu.Layout.WGMMA.reduce(0)
            is_live = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=per_position) < num_live
            return values, jnp.where(is_live, scale, 0)

        @pl.when(num_live < BLOCK)
        def _():
            is_live = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA) < num_live
            block = _load(values, layout=plgpu.Layout.WGMMA, optimized=False)
            values[...] = jnp.where(is_live, block, 0)
            plgpu.commit_smem()

        return values, None


def _kernel(shape: Shape, scalars_ref, table_ref, q_ref, k_ref, v_ref, *refs):
    """Computes one tile of queries of one unit and row, over one split of its live blocks."""
    *scale_refs, out_ref, stats_ref, scratch = refs
    tile, split = lax.div(lax.axis_index("tile"), shape.splits), lax.rem(lax.axis_index("tile"), shape.splits)
    unit, row = lax.axis_index("unit"), lax.axis_index("row")
    offset, first = scalars_ref[0], scalars_ref[1 + row] + tile * shape.rows
    last = first + (shape.rows - 1 if shape.prefill else 0)
    num_live = lax.div(last - offset + shape.stride, jnp.int32(shape.stride))  # 0 or less if this shard has none
    num_blocks = lax.div(num_live + (BLOCK - 1), jnp.int32(BLOCK))
    begin, end = (lax.div(num_blocks * (split + i), jnp.int32(shape.splits)) for i in (0, 1))
    sources = dict(zip(("k", "v", "k_scale", "v_scale"), (k_ref, v_ref, *scale_refs), strict=False))
    head = lax.div(unit, jnp.int32(shape.units // shape.kv_heads))
    copies = _Copies(scratch, sources, table_ref, row, head, begin, end, num_live, shape.buffers)

    tile_rows, used = pl.ds(tile * shape.rows, shape.rows), pl.ds(0, shape.rows)
    plgpu.copy_gmem_to_smem(q_ref.at[row, unit, tile_rows], scratch["q"].at[used], scratch["q_barrier"])
    if shape.new is not None:
        new_rows = pl.ds(shape.new, 2)
        plgpu.copy_gmem_to_smem(q_ref.at[row, unit, new_rows], scratch["new"], scratch["new_barrier"])
    numbers = [copies.find(begin + i) for i in range(shape.buffers)]
    for i, number in enumerate(numbers):
        copies.start(begin + i, number)
    plgpu.barrier_wait(scratch["q_barrier"])
    if shape.new is not None:
        plgpu.barrier_wait(scratch["new_barrier"])

    def add_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number = copies.find(i + shape.buffers)  # before it is needed: the read takes long, and goes on meanwhile
        carry = _add_block(shape, copies, first - offset, i, carry)
        copies.start(i + shape.buffers, number)
        return carry

    per_row, layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    initial = (
        plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), per_row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_row),
        plgpu.layout_cast(jnp.zeros((ROWS, shape.head_dim), jnp.float32), layout),
    )
    scratch["stats"][0], scratch["stats"][1], scratch["out"][...] = lax.fori_loop(begin, end, add_block, initial)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["out"].at[used], out_ref.at[row, unit, split, tile])
    for n in range(2):
        plgpu.copy_smem_to_gmem(scratch["stats"].at[n, used], stats_ref.at[row, unit, split, tile, n])
    if shape.new is not None:
        is_valid = scalars_ref[1 + out_ref.shape[0] + row] > 0
        pl.when(is_valid & (split == shape.splits - 1))(copies.write_new)
    plgpu.wait_smem_to_gmem(0)


def _add_block(shape: Shape, copies: _Copies, first: Array, i: Array, carry: Any) -> Any:
    """Returns the running maximum, normaliser and output after block i (online softmax).

    Args:
      first: position of the tile's first query, less the context shard's offset.
    """
    (maximum, total, out), scratch = carry, copies.scratch
    tile, layout = (ROWS, BLOCK), plgpu.Layout.WGMMA
    keys, key_scale = copies.wait("k", i)
    if shape.new is not None:
        copies.insert_new("k", i, keys)
    scores = _matmul(scratch["q"], keys.transpose((1, 0)), tile)
    if key_scale is not None:
        scores = scores * lax.broadcast_in_dim(key_scale, tile, [1])
    position = (plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=layout) + i * BLOCK) * shape.stride
    query = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=layout) if shape.prefill else 0
    scores = jnp.where(position <= query + first, scores, -jnp.inf)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    scale = jnp.exp(maximum - new_maximum)
    probs = jnp.exp(scores - lax.broadcast_in_dim(new_maximum, tile, [0]))
    total = total * scale + probs.sum(axis=1)
    values, value_scale = copies.wait_for_values(i)
    if value_scale is not None:
        probs = probs * lax.broadcast_in_dim(value_scale, tile, [1])
    probs = probs.astype(jnp.bfloat16)
    if "probs" in scratch:  # the interpreter has no wgmma with an operand in registers
        scratch["probs"][...] = probs
        probs = scratch["probs"]
    out = out * lax.broadcast_in_dim(scale, out.shape, [0]) + _matmul(probs, values, out.shape)
    return new_maximum, total, out


def _matmul(a: Any, b: Any, shape: tuple[int, int]) -> Array:
    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))
