"""Grouped matmul on TPUs: multiplies rows sorted by expert by the weight of their expert, for large batches.

The outer dimension of the grid goes over column tiles of the output, the inner one over the row tiles of one expert
after another, so each weight is read once. Quantised weights are dequantised in VMEM, a chunk at a time.
jax.lax.ragged_dot copies weights (E, M, C) to another layout and does not support int4. The gradient of the weight is
JAX's megablox tgmm.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Float, Int

from dbrx_jax.kernels.tile_table import table
from dbrx_jax.kernels.tpu.packed_weights import (
    CHUNK,
    INT4_FACTOR,
    LANES,
    MAX_VMEM,
    WeightFormat,
    expand_row_scales,
    has_kernel,
    iota,
    matmul,
    scale_bytes,
    stored_values,
    tiles_name,
    unpack_even_odd,
)
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

ROW_TILES = (128, 256, 512)
MAX_RULE_COLUMNS = 512  # wider tiles delay the first matmul, which waits for the first tile of the weight
GRADIENT_TILE = 512  # tgmm's blocks must fit Mosaic's default VMEM limit, 16 MiB


class GroupedTiles(NamedTuple):
    """Tile sizes: rows of one matmul, and columns of its result: a multiple of 128 that divides M, or M."""

    rows: int
    columns: int


def supports(rows: Float[Array, "P C"], weight: Weight, contracted: int, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_matmul` supports these arrays (or shapes).

    A quantised weight must be quantised along its contracted dimension; the size of its groups must divide 128.
    """
    weight_format, depth = WeightFormat.of(weight), weight.shape[2 if contracted else 1]
    if rows.dtype not in (jnp.bfloat16, jnp.float32) or rows.shape[1] != depth or depth % 64 or not has_kernel(weight):
        return False
    if isinstance(weight, QuantizedArray) and weight.contracted != ((-1,) if contracted else (-2,)):
        return False
    if weight_format.packed and contracted and depth % (2 * LANES):
        return False
    if weight_format.group is not None and (LANES % weight_format.group or depth % weight_format.group):
        return False
    return bool(tile_candidates(rows, weight, contracted))


def tile_candidates(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> list[GroupedTiles]:
    """Returns the tile sizes that fit into VMEM, in ascending order."""
    m = weight.shape[1 if contracted else 2]
    columns = [n for n in range(LANES, m, LANES) if m % n == 0] + [m]
    tiles = [GroupedTiles(r, n) for r in ROW_TILES for n in columns]
    return [t for t in tiles if vmem_bytes(rows, weight, contracted, t) <= MAX_VMEM]


def default_tiles(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> GroupedTiles:
    """Returns the table's tile sizes for the average rows per expert if they are valid, else those of the rule."""
    rows_per_expert = math.ceil(rows.shape[0] / weight.shape[0])
    tuned = table().get(tiles_name(f"grouped_tpu {contracted}", weight, rows_per_expert))
    candidates = tile_candidates(rows, weight, contracted)
    return next((t for t in candidates if list(t) == tuned), rule_tiles(rows, weight, contracted))


def rule_tiles(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> GroupedTiles:
    """Returns the candidate with the average rows per expert and the most columns up to MAX_RULE_COLUMNS."""
    candidates = tile_candidates(rows, weight, contracted)
    rows_per_expert = rows.shape[0] / weight.shape[0]
    preferred_rows = next((r for r in ROW_TILES if r >= rows_per_expert), ROW_TILES[-1])
    for tile_rows in (preferred_rows, ROW_TILES[0]):
        fitting = [t for t in candidates if t.rows == tile_rows and t.columns <= MAX_RULE_COLUMNS]
        if fitting:
            return fitting[-1]
    return candidates[0]


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    contracted: int,
    sizes: Int[Array, "E"],
    tiles: GroupedTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "P M"]:
    """Multiplies each group of rows by its weight, summed in float32, in the rows' dtype; 0 for rows in no group.

    Args:
      rows: sorted by group.
      weight: (E, M, C), or (E, C, M); of the rows' dtype or quantised, as :func:`supports` accepts it.
      contracted: 1 for (E, M, C), 0 for (E, C, M).
      sizes: number of rows of each group.
      interpret: interprets the kernel on a CPU.
    """
    num_rows = rows.shape[0]
    tiles, weight_format = tiles or default_tiles(rows, weight, contracted), WeightFormat.of(weight)
    rows = jnp.pad(rows, ((0, -num_rows % tiles.rows), (0, 0)))
    steps = grouped_steps(sizes.astype(jnp.int32), rows.shape[0], tiles.rows)
    operands = grouped_operands(rows, weight, contracted, tiles)
    y = pl.pallas_call(
        partial(_kernel, contracted=contracted, weight_format=weight_format),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], weight.shape[1 if contracted else 2]), rows.dtype),
        grid_spec=grouped_grid(operands, contracted, steps, tiles, weight_format),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MAX_VMEM),
        interpret=interpret,
        name="grouped_matmul",
    )(*steps[:-1], *operands)
    return y[:num_rows]


def gradient_supports(left: Float[Array, "P M"], right: Float[Array, "P C"], interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_gradient` supports these arrays (or shapes)."""
    return left.dtype == right.dtype and left.dtype in (jnp.bfloat16, jnp.float32)


def grouped_gradient(
    left: Float[Array, "P M"], right: Float[Array, "P C"], sizes: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "E M C"]:
    """Returns left^T right of each group of rows, summed in float32, in their dtype; zeros for an empty group."""
    padding = -left.shape[0] % LANES
    left, right = (jnp.pad(a, ((0, padding), (0, 0))) for a in (left, right))
    tile_rows = next(t for t in (512, 256, LANES) if left.shape[0] % t == 0)
    tiling = (tile_rows, *(min(GRADIENT_TILE, a.shape[1]) for a in (left, right)))
    with jax.default_matmul_precision("highest" if left.dtype == jnp.float32 else "default"):
        return tgmm(left.T, right, sizes.astype(jnp.int32), left.dtype, tiling, interpret=interpret)


class GroupedSteps(NamedTuple):
    """Schedule of up to S grid steps, each of which computes the rows of one group in one row tile.

    Args:
      group: the group, or E for rows in no group.
      tile: the row tile of the result.
      expert, source: weight and row tile to read; for rows in no group the previous step's, so nothing is copied.
      starts, ends: range of rows of each group, and of those in no group.
      number: number of steps.
    """

    group: Int[Array, "S"]
    tile: Int[Array, "S"]
    expert: Int[Array, "S"]
    source: Int[Array, "S"]
    starts: Int[Array, "E+1"]
    ends: Int[Array, "E+1"]
    number: Int[Array, ""]


def grouped_steps(sizes: Int[Array, "E"], num_rows: int, tile_rows: int) -> GroupedSteps:
    """Schedules the row tiles of each group in order; `tile_rows` must divide `num_rows`."""
    num_groups, num_tiles = sizes.shape[0], num_rows // tile_rows
    ends = jnp.cumsum(jnp.append(sizes, num_rows - jnp.sum(sizes)))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first_tiles = starts // tile_rows
    num_steps = jnp.where(ends > starts, (ends + tile_rows - 1) // tile_rows - first_tiles, 0)
    last_steps = jnp.cumsum(num_steps)
    step = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(step[:, None] >= last_steps, axis=1, dtype=jnp.int32), num_groups)
    tile = jnp.minimum(first_tiles[group] + step - (last_steps - num_steps)[group], num_tiles - 1)
    last_expert = jnp.max(jnp.where(sizes > 0, jnp.arange(num_groups, dtype=jnp.int32), 0))
    last_source = jnp.maximum(ends[num_groups - 1] - 1, 0) // tile_rows
    expert = jnp.where(group == num_groups, last_expert, group)
    source = jnp.where(group == num_groups, last_source, tile)
    return GroupedSteps(group, tile, expert, source, starts, ends, last_steps[-1])


def grouped_operands(rows: Array, weight: Weight, contracted: int, tiles: GroupedTiles) -> list[Any]:
    """Reshapes rows and scales for the kernel; the weight's values stay in their layout."""
    if not isinstance(weight, QuantizedArray):
        return [rows, weight]
    weight_format, scale = WeightFormat.of(weight), weight.scale
    if contracted and weight_format.packed:
        # In each chunk of 256, elements with an even index first: the order in which unpack_even_odd unpacks 128 bytes.
        rows = rows.reshape(rows.shape[0], -1, LANES, 2).swapaxes(2, 3).reshape(rows.shape)
    if weight_format.group is None:
        scale = scale.reshape(scale.shape[0], -1, 1, tiles.columns)
    elif contracted:
        scale = scale.swapaxes(1, 2)
    return [rows, weight.values, scale]


def grouped_grid(
    operands: list[Any], contracted: int, steps: GroupedSteps, tiles: GroupedTiles, weight_format: WeightFormat
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid (column tiles, steps) and the block specs of the operands."""
    rows, values = operands[:2]
    depth, m = rows.shape[1], values.shape[1 if contracted else 2]

    def weight_index(n, i, group, tile, expert, *_):
        return (expert[i], n, 0) if contracted else (expert[i], 0, n)

    weight_block = (tiles.columns, values.shape[2]) if contracted else (values.shape[1], tiles.columns)
    specs = [
        pl.BlockSpec((tiles.rows, depth), lambda n, i, group, tile, expert, source, *_: (source[i], 0)),
        pl.BlockSpec((None, *weight_block), weight_index),
    ]
    scratch = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)]
    if weight_format.scaled and weight_format.group is None:
        specs.append(pl.BlockSpec((None, None, 1, tiles.columns), lambda n, i, g, t, expert, *_: (expert[i], n, 0, 0)))
    elif weight_format.scaled:
        num_groups = depth // weight_format.group
        specs.append(pl.BlockSpec((None, num_groups, tiles.columns), lambda n, i, g, t, expert, *_: (expert[i], 0, n)))
        scratch += [] if contracted else [pltpu.VMEM((num_groups, tiles.columns), jnp.float32)]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(m // tiles.columns, steps.number),
        in_specs=specs,
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, i, group, tile, *_: (tile[i], n)),
        scratch_shapes=scratch,
    )


def _kernel(groups, tile, expert, source, starts, ends, rows, w, *refs, contracted: int, weight_format: WeightFormat):
    """Computes the rows of one group in one row tile; a tile's first step sets its other rows to 0."""
    scales, (y, sums, *float32_scales) = (refs[0], refs[1:]) if weight_format.scaled else (None, refs)
    i = pl.program_id(1)
    group = groups[i]

    @pl.when((i == 0) | (tile[i] != tile[jnp.maximum(i - 1, 0)]))
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(group < starts.shape[0] - 1)
    def _():
        if float32_scales:  # Mosaic loads a single row at a dynamic index only of 32-bit elements
            float32_scales[0][...] = scales[...].astype(jnp.float32)
        _matmul(sums, rows, w, float32_scales[0] if float32_scales else scales, contracted, weight_format)
        total = sums[...]
        if weight_format.scaled and weight_format.group is None:
            total = total * scales[...].astype(jnp.float32)
        row = tile[i] * y.shape[0] + iota(y.shape, 0)
        in_group = (row >= starts[group]) & (row < ends[group])
        y[...] = jnp.where(in_group, total.astype(y.dtype), y[...])


def _matmul(sums, rows, w, scales, contracted: int, weight_format: WeightFormat) -> None:
    """Stores rows w^T (contracted 1) or rows w (0) in `sums`, without scales per channel."""
    depth = rows.shape[1]
    size = chunk_size(depth, contracted, weight_format)
    stored_size = size // 2 if weight_format.packed else size
    sums[...] = jnp.zeros_like(sums)

    def add_chunk(k, carry):
        x = rows[:, pl.ds(pl.multiple_of(k * size, size), size)]
        chunk = pl.ds(pl.multiple_of(k * stored_size, stored_size), stored_size)
        if contracted:
            values = unpack_even_odd(w[:, chunk], x.dtype) if weight_format.packed else w[:, chunk].astype(x.dtype)
            if weight_format.group is not None:
                values = (values * expand_row_scales(scales, k, size, weight_format.group)).astype(x.dtype)
        else:
            values = (pltpu.bitcast(w[chunk], jnp.int4) if weight_format.packed else w[chunk]).astype(x.dtype)
            if weight_format.group is not None:
                values = _scale_rows(values, scales, k, weight_format.group)
        sums[...] += matmul(x, values, contracted)
        return carry

    if size == depth:
        add_chunk(0, 0)
    else:
        lax.fori_loop(0, depth // size, add_chunk, 0)
    if weight_format.packed and contracted and weight_format.group is None:
        sums[...] = sums[...] / INT4_FACTOR


def chunk_size(depth: int, contracted: int, weight_format: WeightFormat) -> int:
    """Returns the elements of the contraction in one matmul: a multiple of LANES, or all `depth`."""
    if weight_format.packed and contracted:
        return 2 * LANES
    return next((n for n in range(min(CHUNK, depth) // LANES * LANES, 0, -LANES) if depth % n == 0), depth)


def _scale_rows(w: Array, scales, k, group: int) -> Array:
    """Multiplies chunk k (size, tile) of a weight (C, M) by its scales, rows of (groups, tile)."""
    num_groups = w.shape[0] // group
    scaled = []
    for g in range(num_groups):
        rows = w[g * group : (g + 1) * group].astype(jnp.float32)
        scaled.append(rows * scales[pl.ds(k * num_groups + g, 1)])
    return jnp.concatenate(scaled).astype(w.dtype)


def vmem_bytes(rows: Float[Array, "P C"], weight: Weight, contracted: int, tiles: GroupedTiles) -> int:
    """Returns the bytes of VMEM that the kernel needs: two buffers of each block, and a step's intermediates."""
    weight_format, depth, itemsize = WeightFormat.of(weight), rows.shape[1], rows.dtype.itemsize
    values, num_results = stored_values(weight), tiles.rows * tiles.columns
    weight_bytes = tiles.columns * values.shape[2 if contracted else 1] * values.dtype.itemsize
    blocks = tiles.rows * depth * itemsize + weight_bytes + num_results * itemsize
    scales = 0
    if weight_format.group is not None:
        scales = (depth // weight_format.group) * tiles.columns * (4 + 2 * scale_bytes(weight))
    # The weight's chunk in float32 and in the rows' dtype; the sums, and the product that is added to them.
    chunk = chunk_size(depth, contracted, weight_format) * (tiles.columns * (4 + itemsize) + tiles.rows * itemsize)
    return 2 * blocks + scales + chunk + 2 * num_results * 4


def grouped_bytes(
    rows: Float[Array, "P C"], weight: Weight, contracted: int, sizes: Sequence[int], tiles: GroupedTiles | None = None
) -> int:
    """Returns the HBM bytes that :func:`grouped_matmul` reads and writes.

    Weights of groups with rows are read once, rows once per column tile, and the result is written once.
    """
    tiles = tiles or default_tiles(rows, weight, contracted)
    m = weight.shape[1 if contracted else 2]
    num_read_tiles = max(1, -(-sum(sizes) // tiles.rows))
    num_written_tiles = -(-rows.shape[0] // tiles.rows)
    num_reads = m // tiles.columns if num_read_tiles > 1 else 1  # a single row tile stays in VMEM
    weights = max(1, sum(n > 0 for n in sizes)) * (weight.nbytes // weight.shape[0])
    elements = num_read_tiles * num_reads * rows.shape[1] + num_written_tiles * m  # per row of a tile
    return weights + tiles.rows * rows.dtype.itemsize * elements
