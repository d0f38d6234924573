"""Grouped matmul on Hopper GPUs: each row times the weight of its group, for many rows sorted by group.

Plain weights go through JAX's ragged_dot for Hopper. Quantised weights are dequantised in registers tile by tile
(accumulate.py), so the whole weight never exists in bfloat16. A row tile that spans several groups is computed for
each, and each stores its own rows.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jaxtyping import Float, Int

from dbrx_jax.kernels.gpu.accumulate import Block, accumulate_tile, by_channel
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, activations, fits, pack, split_scales
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.linear import Weight


class GroupedTiles(NamedTuple):
    """Tile sizes of a grouped matmul with quantised weights.

    Attributes:
      rows: of activations in a block, a multiple of 8 and at most 256.
      channels: words of output channels in a block, a multiple of 64.
      depth: words along the contraction in a step.
      steps: of weights and rows that are on their way at once.
      band: tiles of rows that go over all channels together, to find the weights in the cache.
    """

    rows: int
    channels: int
    depth: int
    steps: int
    band: int = 8


class _Work(NamedTuple):
    """Pairs of a tile of rows and a group (L,): tiles times groups at most, the rest empty."""

    group: Array
    tile: Array
    start: Array  # own rows in the tile, from start to end
    end: Array


def _work(sizes: Array, rows: int, tile: int) -> _Work:
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // tile
    counts = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    last = jnp.cumsum(counts)
    i = jnp.arange(-(-rows // tile) + sizes.shape[0] - 1)
    group = jnp.minimum(jnp.searchsorted(last, i, side="right"), sizes.shape[0] - 1)
    block = first[group] + i - (last - counts)[group]
    start = jnp.maximum(starts[group] - block * tile, 0)
    end = jnp.where(i < last[-1], jnp.minimum(ends[group] - block * tile, tile), start)
    return _Work(*(a.astype(jnp.int32) for a in (group, block, start, end)))


def _quantized(rows: Array, weight: PackedWeights, sizes: Array, tiles: GroupedTiles, interpret: Any) -> Array:
    """(P', M) in bfloat16, P' padded to whole tiles; rows of no group are undefined."""
    padded = jnp.pad(rows, ((0, -rows.shape[0] % tiles.rows), (0, 0)))
    x = activations(padded, weight)
    work = _work(sizes, padded.shape[0], tiles.rows)
    count, across = work.group.shape[0], weight.channels // tiles.channels
    scales = [weight.groups if weight.scale is None else _channel_scales(weight)]
    out_dtype = jnp.bfloat16 if weight.outputs == 1 else jnp.uint32  # two neighbouring channels

    def body(group_ref, tile_ref, start_ref, end_ref, x_ref, bits_ref, scale_ref, out, out_tile):
        pair, channel = plgpu.planar_snake(lax.axis_index("work"), (count, across), 1, tiles.band)
        start, end = start_ref[pair], end_ref[pair]

        @pl.when(start < end)
        def _():
            group, tile = group_ref[pair], tile_ref[pair]
            block = Block(weight, tiles, tiles.rows, channel, tile, 0, weight.depth // tiles.depth, bool(interpret))
            scale = scale_ref.at[group]
            totals = accumulate_tile(block, [bits_ref.at[group]], [] if weight.group is None else [scale], x_ref)
            if weight.group is None:
                totals = _scaled(block, totals, scale)
            packed = plgpu.layout_cast(_packed(totals), plgpu.Layout.WGMMA_TRANSPOSED)
            _store_transposed(out_tile, packed)
            plgpu.commit_smem()
            _store(out_tile, out, tile, start, end, pl.ds(channel * tiles.channels, tiles.channels))

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((padded.shape[0], weight.channels), out_dtype),
        grid=(count * across,),
        grid_names=("work",),
        scratch_types=[plgpu.SMEM((tiles.rows, tiles.channels), out_dtype)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    out = run(*work, x, weight.bits, *scales)
    return out if weight.outputs == 1 else lax.bitcast_convert_type(out, jnp.bfloat16).reshape(out.shape[0], -1)


def _channel_scales(weight: PackedWeights) -> Array:
    """(E, words of channels): each channel's scale, or two neighbours in a uint32."""
    flat = weight.scale.reshape(weight.scale.shape[0], -1, weight.outputs)
    return flat[:, :, 0] if weight.outputs == 1 else lax.bitcast_convert_type(flat, jnp.uint32)


def _scaled(block: Block, totals: tuple[Array, ...], ref: Any) -> list[Array]:
    own = by_channel(ref.at[pl.ds(block.channel * block.tiles.channels, block.tiles.channels)])
    scales = [own.astype(jnp.float32)] if block.weight.outputs == 1 else split_scales(own)
    return [t * lax.broadcast_in_dim(s, t.shape, (0,)) for t, s in zip(totals, scales, strict=True)]


def _store_transposed(tile: Any, values: Array) -> None:
    """Stores values (channels, rows) in a tile (rows, channels) of shared memory."""
    store: Any = getattr(plgpu, "store", None)
    if store is None:  # jax 0.11, which finds the layout itself
        tile.transpose((1, 0))[...] = values
    else:
        store(tile.transpose((1, 0)), values, optimized=False)


def _packed(totals: Any) -> Array:
    """Sums of one output as bfloat16, of two as pairs of them in a uint32."""
    if len(totals) == 1:
        return totals[0].astype(jnp.bfloat16)
    # Rounded, a float32 keeps a bfloat16 in its upper half.
    low, high = (lax.bitcast_convert_type(t.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for t in totals)
    return lax.shift_right_logical(low, jnp.uint32(16)) | high


def _store(shared: Any, out: Any, tile: Array, start: Array, end: Array, channels: Any) -> None:
    """Own rows alone: in pieces of 2^i rows, one for each bit of their number, for a copy's size is fixed."""
    rows, size = shared.shape[0], end - start
    for bit in reversed(range(rows.bit_length())):
        piece = 1 << bit

        @pl.when((size & piece) != 0)
        def _(at=start, piece=piece):
            plgpu.copy_smem_to_gmem(shared.at[pl.ds(at, piece)], out.at[pl.ds(tile * rows + at, piece), channels])

        start = start + (size & piece)
    plgpu.wait_smem_to_gmem(0)


class PlainTiles(NamedTuple):
    """Tile sizes of a grouped matmul with plain weights, as JAX's ragged_dot for Hopper takes them.

    Attributes:
      rows, channels, depth: of a block in a step.
      steps: on their way at once.
      band: tiles of channels that go over all rows together.
    """

    rows: int = 128
    channels: int = 128
    depth: int = 64
    steps: int = 4
    band: int = 8


def supports(rows: Any, weight: Weight, contracted: int, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_matmul` supports these shapes and dtypes (arrays or shapes)."""
    if rows.dtype != weight.dtype or not (rows.dtype == jnp.bfloat16 or interpret) or not fits(weight, contracted):
        return False
    return bool(_candidates(jax.eval_shape(partial(pack, contracted=contracted), weight)))


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    contracted: int,
    sizes: Int[Array, "E"],
    tiles: GroupedTiles | PlainTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "P M"]:
    """Each row times its group's matrix, in the rows' dtype, summed in float32.

    Args:
      rows: sorted by group; rows past the sum of sizes give 0, whatever they contain.
      weight: that :func:`supports` takes: contracted 1: (E, M, C); 0: (E, C, M).
      sizes: rows of each group, also 0.
      tiles: PlainTiles for a plain weight, GroupedTiles for another; :func:`default_tiles` by default.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.
    """
    taken = pack(weight, contracted)
    tiles = tiles or default_tiles(rows, weight, contracted)
    product: Callable[..., Array] = _plain if taken.kind == "plain" else _quantized
    y = product(rows, taken, sizes, tiles, interpret)[: rows.shape[0]]
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], y, 0).astype(rows.dtype)


def default_tiles(rows: Any, weight: Weight, contracted: int) -> GroupedTiles | PlainTiles:
    """The table's, else the first of the candidates."""
    candidates: list[Any] = candidate_tiles(weight, contracted)
    found = table().get(tiles_name(rows, weight, contracted))
    return next((t for t in candidates if found is not None and list(t) == found), candidates[0])


def tiles_name(rows: Any, weight: Weight, contracted: int) -> str:
    """Name of a matmul in the table of tile sizes, by an expert's share of the rows."""
    w = jax.eval_shape(partial(pack, contracted=contracted), weight)
    share = math.ceil(rows.shape[0] / weight.shape[0])
    return name_of(f"grouped_gpu {contracted}", w.kind, w.group, (w.channels, w.depth), share)


def candidate_tiles(weight: Weight, contracted: int) -> list[GroupedTiles] | list[PlainTiles]:
    """Tile sizes worth timing for a weight that :func:`supports` accepts, the default first."""
    return _candidates(jax.eval_shape(partial(pack, contracted=contracted), weight))


def _candidates(weight: PackedWeights) -> list[GroupedTiles] | list[PlainTiles]:
    if weight.kind == "plain":
        return [t for t in itertools.starmap(PlainTiles, _PLAIN) if _cuts(weight, t)]
    tried = _GROUPED if weight.group is None else _BY_GROUP if weight.outputs == 1 else _BY_GROUP_OF_TWO
    return [t for t in itertools.starmap(GroupedTiles, tried) if _cuts(weight, t)]


def _cuts(weight: PackedWeights, t: GroupedTiles | PlainTiles) -> bool:
    """Returns whether tiles fit a weight and the shared memory."""
    step = 2 * t.depth * (t.channels + weight.inputs * t.rows)
    shared = t.steps * step + 2 * t.rows * t.channels * weight.outputs
    whole = weight.channels % t.channels == 0 and weight.depth % t.depth == 0 and t.depth % weight.period == 0
    return whole and shared <= _SHARED_BYTES


_SHARED_BYTES = 224 * 1024  # of a block, less than the 227 KiB there are, for barriers
# Rows, channels, depth, steps; the first that fits is the default, the last ones are for small shapes.
_PLAIN = ((128, 128, 64, 4), (128, 256, 64, 3), (64, 256, 64, 4), (64, 64, 64, 4))
_GROUPED = ((128, 64, 64, 3), (64, 64, 64, 4), (192, 64, 64, 2), (128, 64, 32, 4))
# Sums by group beside the totals leave registers for fewer rows, and of two outputs for 64 at most.
_BY_GROUP = ((64, 64, 64, 2), (64, 64, 64, 3), (128, 64, 64, 2), (64, 64, 32, 4))
_BY_GROUP_OF_TWO = ((64, 64, 64, 2), (64, 64, 64, 3), (64, 64, 32, 4))


def _plain(rows: Array, weight: PackedWeights, sizes: Array, tiles: PlainTiles, interpret: Any) -> Array:
    """jax's kernel; rows of no group are undefined."""
    padded = jnp.pad(rows, ((0, -rows.shape[0] % tiles.rows), (0, 0)))
    mosaic: Any = plgpu  # of which versions of jax before 0.11 have no interpreter
    with mosaic.force_gpu_interpret_mode(interpret) if interpret else nullcontext():
        return ragged_dot(
            padded,
            weight.bits,
            group_sizes=sizes.astype(jnp.int32),
            block_m=tiles.rows,
            block_n=tiles.channels,
            block_k=tiles.depth,
            max_concurrent_steps=tiles.steps,
            grid_block_n=tiles.band,
            transpose_rhs=weight.contracted == 1,
        )


def grouped_bytes(
    rows: Any, weight: Weight, contracted: int, sizes: Sequence[int], tiles: GroupedTiles | PlainTiles | None = None
) -> tuple[int, int]:
    """Bytes that :func:`grouped_matmul`'s kernel copies in, most of them from the cache, and out, for these sizes."""
    taken = jax.eval_shape(partial(pack, contracted=contracted), weight)
    tiles = tiles or default_tiles(rows, weight, contracted)
    if taken.kind == "plain":  # every place that there could be a pair in is computed
        pairs = -(-rows.shape[0] // tiles.rows) + len(sizes) - 1
    else:
        ends = list(itertools.accumulate(sizes))
        spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True) if size]
        pairs = sum((end - 1) // tiles.rows - start // tiles.rows + 1 for start, end in spans)
    matrix = taken.channels * taken.depth * taken.bits.dtype.itemsize
    own = tiles.rows * taken.inputs * taken.depth * rows.dtype.itemsize
    out = sum(sizes) * weight.shape[2 - contracted] * rows.dtype.itemsize
    return pairs * (matrix + taken.channels // tiles.channels * own), out
