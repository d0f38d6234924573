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

from dbrx_jax.kernels.gpu.accumulate import Block, accumulate_tile, load_by_channel
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, fits, pack, split_activations, split_scales
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.linear import Weight


class GroupedTiles(NamedTuple):
    """Tile sizes of a grouped matmul with quantised weights.

    Attributes:
      rows: activation rows per thread block, a multiple of 8 and at most 256.
      channels: packed elements of output channels per thread block, a multiple of 64.
      depth: packed elements along the contraction per pipeline step.
      steps: pipeline steps in flight.
      band: row tiles that pass over all channels together, so that weights are read from the L2 cache.
    """

    rows: int
    channels: int
    depth: int
    steps: int
    band: int = 8


class _TileGroups(NamedTuple):
    """Pairs of a row tile and a group that has rows in it, arrays (L,); pairs that do not exist have no rows.

    Attributes:
      start, end: range of the group's rows within the tile.
    """

    group: Array
    tile: Array
    start: Array
    end: Array


def _tile_groups(sizes: Array, num_rows: int, tile_rows: int) -> _TileGroups:
    """Lists the pairs for groups of these sizes, one after another: at most num_tiles + num_groups - 1."""
    group_ends = jnp.cumsum(sizes)
    group_starts = group_ends - sizes
    first_tile = group_starts // tile_rows
    num_tiles = jnp.where(sizes > 0, (group_ends - 1) // tile_rows - first_tile + 1, 0)
    last_pair = jnp.cumsum(num_tiles)
    pair = jnp.arange(-(-num_rows // tile_rows) + sizes.shape[0] - 1)
    group = jnp.minimum(jnp.searchsorted(last_pair, pair, side="right"), sizes.shape[0] - 1)
    tile = first_tile[group] + pair - (last_pair - num_tiles)[group]
    start = jnp.maximum(group_starts[group] - tile * tile_rows, 0)
    end = jnp.where(pair < last_pair[-1], jnp.minimum(group_ends[group] - tile * tile_rows, tile_rows), start)
    return _TileGroups(*(a.astype(jnp.int32) for a in (group, tile, start, end)))


def _quantized(rows: Array, weight: PackedWeights, sizes: Array, tiles: GroupedTiles, interpret: Any) -> Array:
    """Multiplies by quantised weights: bfloat16 rows (P', M), P padded to whole tiles; undefined in no group."""
    padded = jnp.pad(rows, ((0, -rows.shape[0] % tiles.rows), (0, 0)))
    x = split_activations(padded, weight)
    pairs = _tile_groups(sizes, padded.shape[0], tiles.rows)
    grid = pairs.group.shape[0], weight.channels // tiles.channels
    scales = weight.group_scales if weight.scale is None else _channel_scales(weight)
    out_dtype = jnp.bfloat16 if weight.num_outputs == 1 else jnp.uint32  # a uint32 packs two neighbouring channels

    def body(group_ref, tile_ref, start_ref, end_ref, x_ref, bits_ref, scale_ref, out, out_tile):
        pair, channel_tile = plgpu.planar_snake(lax.axis_index("block"), grid, 1, tiles.band)
        start, end = start_ref[pair], end_ref[pair]

        @pl.when(start < end)
        def _():
            group, tile = group_ref[pair], tile_ref[pair]
            num_steps = weight.depth // tiles.depth
            block = Block(weight, tiles, tiles.rows, channel_tile, tile, 0, num_steps, bool(interpret))
            bits, scale = bits_ref.at[group], scale_ref.at[group]
            channels = pl.ds(channel_tile * tiles.channels, tiles.channels)
            if weight.group_depth is None:
                totals = _scale_channels(accumulate_tile(block, [bits], [], x_ref), scale.at[channels])
            else:
                totals = accumulate_tile(block, [bits], [scale], x_ref)
            _store_transposed(out_tile, plgpu.layout_cast(_to_bfloat16(totals), plgpu.Layout.WGMMA_TRANSPOSED))
            plgpu.commit_smem()
            _store_rows(out_tile, out, tile, start, end, channels)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((padded.shape[0], weight.channels), out_dtype),
        grid=(math.prod(grid),),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((tiles.rows, tiles.channels), out_dtype)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    out = run(*pairs, x, weight.bits, scales)
    return out if weight.num_outputs == 1 else lax.bitcast_convert_type(out, jnp.bfloat16).reshape(out.shape[0], -1)


def _channel_scales(weight: PackedWeights) -> Array:
    """Returns each channel's scale, or pairs of neighbours in a uint32: (E, weight.channels)."""
    scales = weight.scale.reshape(weight.scale.shape[0], -1, weight.num_outputs)
    return scales[:, :, 0] if weight.num_outputs == 1 else lax.bitcast_convert_type(scales, jnp.uint32)


def _scale_channels(totals: tuple[Array, ...], ref: Any) -> tuple[Array, ...]:
    """Multiplies the sums of each output by their channels' scales."""
    stored = load_by_channel(ref)
    scales = [stored.astype(jnp.float32)] if len(totals) == 1 else split_scales(stored)
    return tuple(t * lax.broadcast_in_dim(s, t.shape, (0,)) for t, s in zip(totals, scales, strict=True))


def _store_transposed(tile: Any, values: Array) -> None:
    """Stores values (channels, rows) in a tile (rows, channels) of shared memory."""
    store: Any = getattr(plgpu, "store", None)
    if store is None:  # jax 0.11, which finds the layout itself
        tile.transpose((1, 0))[...] = values
    else:
        store(tile.transpose((1, 0)), values, optimized=False)


def _to_bfloat16(totals: tuple[Array, ...]) -> Array:
    """Casts the sums of one output to bfloat16; packs those of two in a uint32."""
    if len(totals) == 1:
        return totals[0].astype(jnp.bfloat16)
    # A bfloat16 is the upper half of the float32 with the same value.
    low, high = (lax.bitcast_convert_type(t.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for t in totals)
    return lax.shift_right_logical(low, jnp.uint32(16)) | high


def _store_rows(shared: Any, out: Any, tile: Array, start: Array, end: Array, channels: Any) -> None:
    """Copies rows start to end of a tile to global memory, with one copy of static size per bit of their number."""
    tile_rows, num_rows = shared.shape[0], end - start
    for bit in reversed(range(tile_rows.bit_length())):
        size = 1 << bit

        @pl.when((num_rows & size) != 0)
        def _(start=start, size=size):
            rows = out.at[pl.ds(tile * tile_rows + start, size), channels]
            plgpu.copy_smem_to_gmem(shared.at[pl.ds(start, size)], rows)

        start = start + (num_rows & size)
    plgpu.wait_smem_to_gmem(0)


class PlainTiles(NamedTuple):
    """Tile sizes of a grouped matmul with plain weights, the parameters of JAX's ragged_dot for Hopper.

    Attributes:
      rows, channels, depth: tile sizes of a thread block in a pipeline step.
      steps: pipeline steps in flight.
      band: channel tiles that pass over all rows together.
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
    return bool(candidate_tiles(weight, contracted))


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    contracted: int,
    sizes: Int[Array, "E"],
    tiles: GroupedTiles | PlainTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "P M"]:
    """Multiplies each row by its group's matrix, in the rows' dtype, accumulated in float32.

    Args:
      rows: sorted by group; rows past the sum of sizes give 0, even if they are not finite.
      weight: one that :func:`supports` accepts, (E, M, C) with contracted 1 or (E, C, M) with contracted 0.
      sizes: number of rows of each group, possibly 0.
      tiles: PlainTiles for a plain weight, else GroupedTiles; :func:`default_tiles` by default.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.
    """
    packed = pack(weight, contracted)
    tiles = tiles or default_tiles(rows, weight, contracted)
    multiply: Callable[..., Array] = _plain if packed.kind == "plain" else _quantized
    y = multiply(rows, packed, sizes, tiles, interpret)[: rows.shape[0]]
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], y, 0).astype(rows.dtype)


def default_tiles(rows: Any, weight: Weight, contracted: int) -> GroupedTiles | PlainTiles:
    """Returns the table's tile sizes if they are valid, else the first candidate."""
    candidates: list[Any] = candidate_tiles(weight, contracted)
    tuned = table().get(tiles_name(rows, weight, contracted))
    return next((t for t in candidates if list(t) == tuned), candidates[0])


def tiles_name(rows: Any, weight: Weight, contracted: int) -> str:
    """Returns the key of a matmul in the table of tile sizes, by the mean number of rows per expert."""
    w = jax.eval_shape(partial(pack, contracted=contracted), weight)
    rows_per_expert = math.ceil(rows.shape[0] / weight.shape[0])
    return name_of(f"grouped_gpu {contracted}", w.kind, w.group_depth, (w.channels, w.depth), rows_per_expert)


def candidate_tiles(weight: Weight, contracted: int) -> list[GroupedTiles] | list[PlainTiles]:
    """Returns tile sizes worth timing, the default first; none if the weight's sizes are not supported."""
    packed = jax.eval_shape(partial(pack, contracted=contracted), weight)
    if packed.kind == "plain":
        return [t for t in itertools.starmap(PlainTiles, _PLAIN) if _is_valid(packed, t)]
    with_groups = _GROUP_SCALES if packed.num_outputs == 1 else _GROUP_SCALES_TWO_OUTPUTS
    sizes = _CHANNEL_SCALES if packed.group_depth is None else with_groups
    return [t for t in itertools.starmap(GroupedTiles, sizes) if _is_valid(packed, t)]


def _is_valid(weight: PackedWeights, t: GroupedTiles | PlainTiles) -> bool:
    """Returns whether tiles divide a weight and fit the shared memory."""
    step_bytes = 2 * t.depth * (t.channels + weight.num_inputs * t.rows)
    shared_bytes = t.steps * step_bytes + 2 * t.rows * t.channels * weight.num_outputs
    divides = weight.channels % t.channels == 0 and weight.depth % t.depth == 0 and t.depth % weight.period == 0
    return divides and shared_bytes <= _SHARED_BYTES


_SHARED_BYTES = 224 * 1024  # per thread block: 227 KiB less some for barriers
# Rows, channels, depth, steps; the first that is valid is the default, the last ones are for small shapes.
_PLAIN = ((128, 128, 64, 4), (128, 256, 64, 3), (64, 256, 64, 4), (64, 64, 64, 4))
_CHANNEL_SCALES = ((128, 64, 64, 3), (64, 64, 64, 4), (192, 64, 64, 2), (128, 64, 32, 4))
# Sums of a group beside the totals leave registers for fewer rows: at most 64 with two outputs.
_GROUP_SCALES = ((64, 64, 64, 2), (64, 64, 64, 3), (128, 64, 64, 2), (64, 64, 32, 4))
_GROUP_SCALES_TWO_OUTPUTS = ((64, 64, 64, 2), (64, 64, 64, 3), (64, 64, 32, 4))


def _plain(rows: Array, weight: PackedWeights, sizes: Array, tiles: PlainTiles, interpret: Any) -> Array:
    """Multiplies by plain weights with JAX's kernel; rows in no group are undefined."""
    padded = jnp.pad(rows, ((0, -rows.shape[0] % tiles.rows), (0, 0)))
    mosaic: Any = plgpu  # mypy also checks with jax 0.10, which has no interpreter
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
    """Returns the bytes that :func:`grouped_matmul`'s kernel reads, mostly from the L2 cache, and writes."""
    packed = jax.eval_shape(partial(pack, contracted=contracted), weight)
    tiles = tiles or default_tiles(rows, weight, contracted)
    if packed.kind == "plain":  # JAX's kernel also computes pairs without rows
        num_pairs = -(-rows.shape[0] // tiles.rows) + len(sizes) - 1
    else:
        ends = itertools.accumulate(sizes)
        ranges = [(end - size, end) for size, end in zip(sizes, ends, strict=True) if size]
        num_pairs = sum((end - 1) // tiles.rows - start // tiles.rows + 1 for start, end in ranges)
    weight_bytes = packed.channels * packed.depth * packed.bits.dtype.itemsize
    tile_bytes = tiles.rows * packed.num_inputs * packed.depth * rows.dtype.itemsize
    read = num_pairs * (weight_bytes + packed.channels // tiles.channels * tile_bytes)
    return read, sum(sizes) * weight.shape[2 - contracted] * rows.dtype.itemsize
