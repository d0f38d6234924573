"""Attention over the key-value cache on Hopper GPUs: reads live positions only, and keeps scores on the chip.

One kernel for prefill chunks and for decoding. A warp group has up to 64 queries that share a key and value head:
positions of one query head in prefill, query heads of one position in decoding. It streams blocks of 64 positions
through a ring of buffers with a running softmax. In decoding several warp groups share a row's live blocks, and XLA
merges their partial results.
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
from jaxtyping import Float, Int

MASKED = -1e30
ROWS = 64  # queries of a product; fewer leave the rest of it unused
BLOCK = 64  # positions
BUFFERS = {2: 3, 1: 5}  # blocks of keys and of values on the chip, by bytes of an element
WARP_GROUPS = 264  # at least so many decode together: two for each multiprocessor
SWIZZLE = 128  # bytes


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (R, T, H, K) and a cache (B, G, S, K), arrays or shapes."""
    T, H, K = query.shape[1:]
    G, S = key.shape[1:3]
    dtypes = query.dtype == jnp.bfloat16 and key.dtype == value.dtype and key.dtype in (jnp.bfloat16, jnp.int8)
    queries = H // G <= ROWS if T == 1 else T % ROWS == 0
    return dtypes and queries and K == 128 and S % BLOCK == 0


class Shape(NamedTuple):
    """Sizes that the kernel is compiled for."""

    rows: int  # queries of a tile, a multiple of 8
    tiles: int
    units: int  # heads, or groups of heads
    heads: int  # of keys and values
    elements: int
    parts: int  # that a tile's live blocks are split into
    stride: int  # of the context_shard
    scaled: bool
    buffers: int
    successive: bool  # whether a tile's queries are at successive positions, rather than at one


def _shape(query: Any, key: Any, stride: int) -> Shape:
    R, T, H, K = query.shape
    G, size = key.shape[1], jnp.dtype(key.dtype).itemsize
    if T > 1:
        return Shape(ROWS, T // ROWS, H, G, K, 1, stride, size == 1, BUFFERS[size], True)
    parts = -(-WARP_GROUPS // (R * G))
    return Shape(-(-H // G // 8) * 8, 1, G, G, K, parts, stride, size == 1, BUFFERS[size], False)


def cache_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    starts: Int[Array, "R"],
    first_row: Int[Array, ""] | int,
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    scales: tuple[Float[Array, "B G S"], Float[Array, "B G S"]] | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Attention of queries at positions starts[r] … starts[r] + T - 1 of row first_row + r to positions up to theirs.

    Args:
      context_shard: (x, X) where the cache holds every X-th position from x on.
      scales: of the keys and the values of an int8 cache.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.

    Returns:
      Largest score and sum of exp(score - largest), (R, T, H), and the values' sum with these weights, (R, T, H, K).
    """
    R, T, H, K = query.shape
    shape = _shape(query, key, context_shard[1])
    group = H // shape.heads
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    if T > 1:
        q = q.swapaxes(1, 2)
    else:
        q = jnp.pad(q.reshape(R, shape.heads, group, K), ((0, 0), (0, 0), (0, shape.rows - group), (0, 0)))
    at = jnp.concatenate([jnp.stack([jnp.int32(first_row), jnp.int32(context_shard[0])]), starts.astype(jnp.int32)])
    out, stats = _run(shape, R, interpret)(at, q, key, value, *(scales or ()))
    largest, total, out = _merged(stats[..., 0, :], stats[..., 1, :], out)
    if T > 1:
        return largest.swapaxes(1, 2), total.swapaxes(1, 2), out.swapaxes(1, 2)
    largest, total, out = (x[:, :, :group] for x in (largest, total, out))
    return largest.reshape(R, 1, H), total.reshape(R, 1, H), out.reshape(R, 1, H, K)


def hbm_bytes(query: Any, key: Any, starts: np.ndarray, context_shard: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Bytes that one call of the kernel reads and writes, for queries (R, T, H, K) and a cache (B, G, S, K).

    Only the kernel's: putting queries in order and joining parts is not counted. In a chunk, what several heads and
    tiles read of the cache is counted for each, though most of it comes from the chip's second cache.
    """
    shape, (offset, stride) = _shape(query, key, context_shard[1]), context_shard
    lasts = starts[:, None] + (np.arange(shape.tiles) + 1) * shape.rows - 1 if shape.successive else starts[:, None]
    blocks = -(-((lasts - offset + stride) // stride) // BLOCK)
    position = shape.elements * key.dtype.itemsize + 2 * shape.scaled
    queries = len(starts) * shape.units * shape.parts * shape.tiles * shape.rows
    read = 2 * blocks.sum() * shape.units * BLOCK * position + queries * shape.elements * 2
    return int(read), queries * (shape.elements + 2) * 4


def _merged(largest: Array, total: Array, out: Array) -> tuple[Array, Array, Array]:
    """The parts (R, units, parts, tiles, rows) as one, (R, units, tiles rows)."""
    top = largest.max(axis=2)
    share = jnp.exp(largest - top[:, :, None])
    total, out = (total * share).sum(axis=2), (out * share[..., None]).sum(axis=2)
    top, total, out = (x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (top, total, out))
    return top, total, out


def _run(shape: Shape, rows: int, interpret: Any) -> Any:
    """The kernel as a function of (first row, context_shard, starts), queries, keys, values and scales."""
    swizzled = plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE)
    K, ring, block = shape.elements, shape.buffers, (BLOCK, shape.elements)
    scratch: dict[str, Any] = {
        "q": plgpu.SMEM((ROWS, K), jnp.bfloat16, transforms=swizzled),
        "out": plgpu.SMEM((ROWS, K), jnp.float32),
        "stats": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_here": plgpu.Barrier(),
    }
    for name in "kv":
        floats = plgpu.SMEM(block if shape.scaled else (ring, *block), jnp.bfloat16, transforms=swizzled)
        scratch |= {name: floats, f"{name}_here": plgpu.Barrier(num_barriers=ring, num_arrivals=1 + shape.scaled)}
        if shape.scaled:
            scratch[f"{name}_int8"] = plgpu.SMEM((ring, *block), jnp.int8)
            scratch[f"{name}_scale"] = plgpu.SMEM((ring, BLOCK), jnp.bfloat16)
    if interpret:
        scratch["probs"] = plgpu.SMEM((ROWS, BLOCK), jnp.bfloat16, transforms=swizzled)
    parts = rows, shape.units, shape.parts, shape.tiles
    return plgpu.kernel(
        functools.partial(_kernel, shape),
        out_type=[
            jax.ShapeDtypeStruct((*parts, shape.rows, K), jnp.float32),
            jax.ShapeDtypeStruct((*parts, 2, shape.rows), jnp.float32),
        ],
        scratch_types=[scratch],
        grid=(shape.tiles * shape.parts, shape.units, rows),
        grid_names=("tile", "unit", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


class _Copies(NamedTuple):
    """The copies of blocks of one row and head into the ring."""

    scratch: dict[str, Any]
    sources: dict[str, Any]
    row: Array
    head: Array
    begin: Array
    ring: int

    def slot(self, i: Array) -> Array:
        return lax.rem(i - self.begin, jnp.int32(self.ring))

    def start(self, name: str, i: Array) -> None:
        """Source and destination of block i of keys ("k") or values ("v"), and of its scales."""
        slot, places = self.slot(i), pl.ds(i * BLOCK, BLOCK)
        here = self.scratch[f"{name}_here"].at[slot]
        buffer = self.scratch.get(f"{name}_int8", self.scratch[name])
        plgpu.copy_gmem_to_smem(self.sources[name].at[self.row, self.head, places], buffer.at[slot], here)
        if f"{name}_scale" in self.sources:
            scale = self.sources[f"{name}_scale"].at[self.row, self.head, places]
            plgpu.copy_gmem_to_smem(scale, self.scratch[f"{name}_scale"].at[slot], here)

    def wait(self, name: str, i: Array) -> tuple[Any, Array | None]:
        """Block i as bfloat16 on the chip, and its scales (BLOCK,)."""
        slot = self.slot(i)
        plgpu.barrier_wait(self.scratch[f"{name}_here"].at[slot])
        if f"{name}_scale" not in self.sources:
            return self.scratch[name].at[slot], None
        whole = _load(self.scratch[f"{name}_int8"].at[slot], plgpu.Layout.WGMMA)
        self.scratch[name][...] = whole.astype(jnp.bfloat16)
        plgpu.commit_smem()
        scale = _load(self.scratch[f"{name}_scale"].at[slot], plgpu.Layout.WGMMA.reduce(0))
        return self.scratch[name], scale.astype(jnp.float32)


def _load(ref: Any, layout: Any) -> Array:
    load: Any = plgpu.load  # whose arguments are others in the JAX that this does not run on
    return load(ref, layout=layout, optimized=False)


def _kernel(shape: Shape, at_ref, q_ref, k_ref, v_ref, *refs):
    """One tile of queries of one head, or group of heads, of one row; in decoding one part of its live blocks."""
    *scale_refs, out_ref, stats_ref, scratch = refs
    tile, part = lax.div(lax.axis_index("tile"), shape.parts), lax.rem(lax.axis_index("tile"), shape.parts)
    unit, row = lax.axis_index("unit"), lax.axis_index("row")
    offset, first = at_ref[1], at_ref[2 + row] + tile * shape.rows
    last = first + (shape.rows - 1 if shape.successive else 0)
    places = lax.div(last - offset + shape.stride, jnp.int32(shape.stride))  # live ones; below 1 where there are none
    blocks = lax.div(places + (BLOCK - 1), jnp.int32(BLOCK))
    begin, end = (lax.div(blocks * (part + i), jnp.int32(shape.parts)) for i in (0, 1))
    sources = dict(zip(("k", "v", "k_scale", "v_scale"), (k_ref, v_ref, *scale_refs), strict=False))
    head = lax.div(unit, jnp.int32(shape.units // shape.heads))
    copies = _Copies(scratch, sources, at_ref[0] + row, head, begin, shape.buffers)

    tile_rows = pl.ds(tile * shape.rows, shape.rows)
    plgpu.copy_gmem_to_smem(q_ref.at[row, unit, tile_rows], scratch["q"].at[pl.ds(0, shape.rows)], scratch["q_here"])
    for i in range(shape.buffers):

        @pl.when(begin + i < end)
        def _(i=i):
            for name in "kv":
                copies.start(name, begin + i)

    plgpu.barrier_wait(scratch["q_here"])

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        carry = _add_block(shape, copies, scratch, first - offset, i, carry)

        @pl.when(i + shape.buffers < end)
        def _():
            for name in "kv":
                copies.start(name, i + shape.buffers)

        return carry

    per_row, layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    empty = (
        plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), per_row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_row),
        plgpu.layout_cast(jnp.zeros((ROWS, shape.elements), jnp.float32), layout),
    )
    scratch["stats"][0], scratch["stats"][1], scratch["out"][...] = lax.fori_loop(begin, end, add, empty)
    plgpu.commit_smem()
    used = pl.ds(0, shape.rows)
    plgpu.copy_smem_to_gmem(scratch["out"].at[used], out_ref.at[row, unit, part, tile])
    for n in range(2):
        plgpu.copy_smem_to_gmem(scratch["stats"].at[n, used], stats_ref.at[row, unit, part, tile, n])
    plgpu.wait_smem_to_gmem(0)


def _add_block(shape: Shape, copies: _Copies, scratch: dict[str, Any], first: Array, i: Array, carry: Any) -> Any:
    """The running maximum, normaliser and output with block i.

    Args:
      first: position of the tile's first query, less the context_shard's.
    """
    largest, total, out = carry
    wide, layout = (ROWS, BLOCK), plgpu.Layout.WGMMA
    keys, key_scale = copies.wait("k", i)
    scores = _product(scratch["q"], keys.transpose((1, 0)), wide)
    if key_scale is not None:
        scores = scores * lax.broadcast_in_dim(key_scale, wide, [1])
    place = (plgpu.broadcasted_iota(jnp.int32, wide, 1, layout=layout) + i * BLOCK) * shape.stride
    query = plgpu.broadcasted_iota(jnp.int32, wide, 0, layout=layout) if shape.successive else 0
    scores = jnp.where(place <= query + first, scores, -jnp.inf)
    new = jnp.maximum(largest, scores.max(axis=1))
    share = jnp.exp(largest - new)
    probs = jnp.exp(scores - lax.broadcast_in_dim(new, wide, [0]))
    total = total * share + probs.sum(axis=1)
    values, value_scale = copies.wait("v", i)
    if value_scale is not None:
        probs = probs * lax.broadcast_in_dim(value_scale, wide, [1])
    probs = probs.astype(jnp.bfloat16)
    if "probs" in scratch:  # the interpreter knows no product with registers
        scratch["probs"][...] = probs
        probs = scratch["probs"]
    out = out * lax.broadcast_in_dim(share, out.shape, [0]) + _product(probs, values, out.shape)
    return new, total, out


def _product(a: Any, b: Any, shape: tuple[int, int]) -> Array:
    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))
