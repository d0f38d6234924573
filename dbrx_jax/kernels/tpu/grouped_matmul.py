"""Grouped matmul on TPUs: each row times the weight of its expert, for many rows sorted by expert.

The grid goes over tiles of the output dimension and, within one, over the row tiles of one expert after another, so
each weight is read once. Quantised weights are dequantised a chunk at a time in VMEM. jax.lax.ragged_dot is not used:
it copies weights (E, M, C) to have C before M, and knows no int4. The weight's gradient is JAX's own megablox tgmm.
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
    LANES,
    MAX_VMEM,
    NIBBLE,
    WeightFormat,
    even_odd,
    iota,
    product,
    scale_bytes,
    stored,
    tiles_name,
)
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

ROW_TILES = (128, 256, 512)
# Of tgmm, whose blocks have to fit in the compiler's own limit of VMEM.
TRANSPOSED_TILE = 512


class GroupedTiles(NamedTuple):
    """rows: of one product. columns: of the result, a multiple of 128 that divides M, or M."""

    rows: int
    columns: int


def supports(rows: Float[Array, "P C"], weight: Weight, contracted: int, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_matmul` supports these arrays (or shapes).

    A quantised weight has to be quantised for this contraction, in groups that divide 128 if in any.
    """
    weight_format, c = WeightFormat.of(weight), weight.shape[2 if contracted else 1]
    if rows.dtype not in (jnp.bfloat16, jnp.float32) or rows.shape[1] != c or c % 64:
        return False
    if isinstance(weight, QuantizedArray) and weight.contracted != ((-1,) if contracted else (-2,)):
        return False
    if weight_format.packed and contracted and c % (2 * LANES):
        return False
    if weight_format.group is not None and (LANES % weight_format.group or c % weight_format.group):
        return False
    return bool(tile_candidates(rows, weight, contracted))


def tile_candidates(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> list[GroupedTiles]:
    """The tiles that fit into VMEM, smallest first."""
    m = weight.shape[1 if contracted else 2]
    columns = [n for n in range(LANES, m, LANES) if m % n == 0] + [m]
    tiles = [GroupedTiles(r, n) for r in ROW_TILES for n in columns]
    return [t for t in tiles if vmem_bytes(rows, weight, contracted, t) <= MAX_VMEM]


def default_tiles(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> GroupedTiles:
    """The table's, by an expert's share of the rows; else the rule's."""
    share = math.ceil(rows.shape[0] / weight.shape[0])
    found = table().get(tiles_name(f"grouped_tpu {contracted}", weight, share))
    timed = found is not None and GroupedTiles(*found) in tile_candidates(rows, weight, contracted)
    return GroupedTiles(*found) if found is not None and timed else rule_tiles(rows, weight, contracted)


def rule_tiles(rows: Float[Array, "P C"], weight: Weight, contracted: int) -> GroupedTiles:
    """Rows for an expert's share of them, and up to 512 columns: more only lengthens the way to the first product."""
    candidates = tile_candidates(rows, weight, contracted)
    share = rows.shape[0] / weight.shape[0]
    wanted = next((r for r in ROW_TILES if r >= share), ROW_TILES[-1])
    for most, r in ((512, wanted), (512, ROW_TILES[0])):
        fitting = [t for t in candidates if t.rows == r and t.columns <= most]
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
    """Each group's rows times its weight, summed in float32, in the rows' dtype; 0 for rows past all groups.

    Args:
      rows: group after group.
      weight: (E, M, C), or (E, C, M); of the rows' dtype or quantised, as :func:`supports` takes it.
      contracted: 1 for (E, M, C), 0 for (E, C, M).
      sizes: of the groups, in rows.
      interpret: runs it on a CPU, slowly.
    """
    count = rows.shape[0]
    tiles = tiles or default_tiles(rows, weight, contracted)
    rows = jnp.pad(rows, ((0, -count % tiles.rows), (0, 0)))
    steps = grouped_steps(sizes.astype(jnp.int32), rows.shape[0], tiles.rows)
    weight_format = WeightFormat.of(weight)
    operands = grouped_operands(rows, weight, contracted, tiles)
    spec = grouped_grid(operands, contracted, steps, tiles, weight_format)
    y = pl.pallas_call(
        partial(_kernel, contracted=contracted, weight_format=weight_format),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], weight.shape[1 if contracted else 2]), rows.dtype),
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MAX_VMEM),
        interpret=interpret,
        name="grouped_matmul",
    )(*steps[:-1], *operands)
    return y[:count]


def gradient_supports(left: Float[Array, "P M"], right: Float[Array, "P C"], interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_gradient` supports these arrays (or shapes)."""
    return left.dtype == right.dtype and left.dtype in (jnp.bfloat16, jnp.float32)


def grouped_gradient(
    left: Float[Array, "P M"], right: Float[Array, "P C"], sizes: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "E M C"]:
    """left^T right for each group of rows, summed in float32, in their dtype; zeros for a group without rows."""
    padding = -left.shape[0] % LANES
    left, right = (jnp.pad(a, ((0, padding), (0, 0))) for a in (left, right))
    tile = next(t for t in (512, 256, LANES) if left.shape[0] % t == 0)
    tiling = (tile, *(min(TRANSPOSED_TILE, a.shape[1]) for a in (left, right)))
    with jax.default_matmul_precision("highest" if left.dtype == jnp.float32 else "default"):
        return tgmm(left.T, right, sizes.astype(jnp.int32), left.dtype, tiling, interpret=interpret)


class GroupedSteps(NamedTuple):
    """Work of each of up to S grid steps; group E means the rows past all groups.

    Args:
      group, tile: which rows of which tile, as far as they are in the group, (S,).
      expert, source: whose weight and which tile of rows are read, (S,): past all groups those of the step before,
        so that nothing is.
      starts, ends: of each group's rows, (E + 1,).
      number: how many steps there are.
    """

    group: Int[Array, "S"]
    tile: Int[Array, "S"]
    expert: Int[Array, "S"]
    source: Int[Array, "S"]
    starts: Int[Array, "E+1"]
    ends: Int[Array, "E+1"]
    number: Int[Array, ""]


def grouped_steps(sizes: Int[Array, "E"], rows: int, tile: int) -> GroupedSteps:
    """Each group's row tiles, one after the other, for P rows in tiles that divide them."""
    groups = sizes.shape[0]
    ends = jnp.cumsum(jnp.append(sizes, rows - jnp.sum(sizes)))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first = starts // tile
    visits = jnp.where(ends > starts, (ends + tile - 1) // tile - first, 0)
    until = jnp.cumsum(visits)
    step = jnp.arange(rows // tile + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(step[:, None] >= until, axis=1, dtype=jnp.int32), groups)
    row_tile = jnp.minimum(first[group] + step - (until - visits)[group], rows // tile - 1)
    past = group == groups
    last_expert = jnp.max(jnp.where(sizes > 0, jnp.arange(groups, dtype=jnp.int32), 0))
    last_tile = jnp.maximum(ends[groups - 1] - 1, 0) // tile
    return GroupedSteps(
        group,
        row_tile,
        jnp.where(past, last_expert, group),
        jnp.where(past, last_tile, row_tile),
        starts,
        ends,
        until[-1],
    )


def grouped_operands(rows: Array, weight: Weight, contracted: int, tiles: GroupedTiles) -> list[Any]:
    """Reshapes rows and scales for the kernel; the weight's values stay in their layout."""
    if not isinstance(weight, QuantizedArray):
        return [rows, weight]
    weight_format, scale = WeightFormat.of(weight), weight.scale
    if contracted and weight_format.packed:
        # Of each 256 the even ones first, as 128 bytes of the weight give them.
        rows = rows.reshape(rows.shape[0], -1, LANES, 2).swapaxes(2, 3).reshape(rows.shape)
    if weight_format.group is None:
        scale = scale.reshape(scale.shape[0], -1, 1, tiles.columns)
    elif contracted:
        scale = scale.swapaxes(1, 2)
    return [rows, weight.values, scale]


def grouped_grid(
    operands: list[Any], contracted: int, steps: GroupedSteps, tiles: GroupedTiles, weight_format: WeightFormat
) -> pltpu.PrefetchScalarGridSpec:
    """The grid (tiles of columns, steps), and which block of each operand a step reads."""
    rows, values = operands[:2]
    c, m = rows.shape[1], values.shape[1 if contracted else 2]

    def weight_block(n, i, group, tile, expert, *_):
        return (expert[i], n, 0) if contracted else (expert[i], 0, n)

    shape = (tiles.columns, values.shape[2]) if contracted else (values.shape[1], tiles.columns)
    specs = [
        pl.BlockSpec((tiles.rows, c), lambda n, i, group, tile, expert, source, *_: (source[i], 0)),
        pl.BlockSpec((None, *shape), weight_block),
    ]
    scratch = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)]
    if weight_format.scaled and weight_format.group is None:
        specs.append(pl.BlockSpec((None, None, 1, tiles.columns), lambda n, i, g, t, expert, *_: (expert[i], n, 0, 0)))
    elif weight_format.scaled:
        groups = c // weight_format.group
        specs.append(pl.BlockSpec((None, groups, tiles.columns), lambda n, i, g, t, expert, *_: (expert[i], 0, n)))
        scratch += [] if contracted else [pltpu.VMEM((groups, tiles.columns), jnp.float32)]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(m // tiles.columns, steps.number),
        in_specs=specs,
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, i, group, tile, *_: (tile[i], n)),
        scratch_shapes=scratch,
    )


def _kernel(group, tile, expert, source, starts, ends, rows, w, *refs, contracted: int, weight_format: WeightFormat):
    """One step: the rows of one tile that are one group's, and 0 in those that are no group's."""
    s, refs = (refs[0], refs[1:]) if weight_format.scaled else (None, refs)
    y, sums, scales = refs[0], refs[1], refs[2:]
    i = pl.program_id(1)
    own_group = group[i]

    @pl.when((i == 0) | (tile[i] != tile[jnp.maximum(i - 1, 0)]))
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(own_group < starts.shape[0] - 1)
    def _():
        if scales:  # single rows of it are read, which takes 32 bits an element
            scales[0][...] = s[...].astype(jnp.float32)
        _sum(sums, rows, w, scales[0] if scales else s, contracted, weight_format)
        total = sums[...]
        if weight_format.scaled and weight_format.group is None:
            total = total * s[...].astype(jnp.float32)
        row = tile[i] * y.shape[0] + iota(y.shape, 0)
        own = (row >= starts[own_group]) & (row < ends[own_group])
        y[...] = jnp.where(own, total.astype(y.dtype), y[...])


def _sum(sums, rows, w, s, contracted: int, weight_format: WeightFormat) -> None:
    """Puts rows w^T (contracted 1) or rows w (0) into `sums`, chunk after chunk of the contraction."""
    c = rows.shape[1]
    size = chunk_size(c, contracted, weight_format)
    sums[...] = jnp.zeros_like(sums)

    def add(k, carry):
        x = rows[:, pl.ds(pl.multiple_of(k * size, size), size)]
        stored_size = size // 2 if weight_format.packed else size
        part = pl.ds(pl.multiple_of(k * stored_size, stored_size), stored_size)
        if contracted:
            floats = even_odd(w[:, part], x.dtype) if weight_format.packed else w[:, part].astype(x.dtype)
            if weight_format.group is not None:
                floats = (floats * _across(s, k, size, weight_format.group)).astype(x.dtype)
        else:
            floats = (pltpu.bitcast(w[part], jnp.int4) if weight_format.packed else w[part]).astype(x.dtype)
            if weight_format.group is not None:
                floats = _down(floats, s, k, weight_format.group)
        sums[...] += product(x, floats, contracted)
        return carry

    if size == c:
        add(0, 0)
    else:
        lax.fori_loop(0, c // size, add, 0)
    if weight_format.packed and contracted and weight_format.group is None:
        sums[...] = sums[...] / NIBBLE


def chunk_size(c: int, contracted: int, weight_format: WeightFormat) -> int:
    """Length of the contraction in one matmul, a multiple of the lanes unless it is not split."""
    if weight_format.packed and contracted:
        return 2 * LANES
    return next((n for n in range(min(CHUNK, c) // LANES * LANES, 0, -LANES) if c % n == 0), c)


def _across(s, k, size: int, group: int) -> Array:
    """The scales of chunk k (tile, size) of a weight (M, C), whose even elements come first, from all (groups, tile).

    By the matrix unit, which is exact here: all but one of the products are 0.
    """
    shape = s.shape[0], size
    number = k * (size // group) + lax.div(lax.rem(iota(shape, 1), LANES), group // 2)
    own = (iota(shape, 0) == number).astype(s.dtype)
    return product(s[...], own, 0, 0) / NIBBLE


def _down(w: Array, scales, k, group: int) -> Array:
    """A chunk (size, tile) of a weight (C, M) times its scales, from (groups, tile)."""
    groups = w.shape[0] // group
    parts = [
        w[g * group : (g + 1) * group].astype(jnp.float32) * scales[pl.ds(k * groups + g, 1)] for g in range(groups)
    ]
    return jnp.concatenate(parts).astype(w.dtype)


def vmem_bytes(rows: Float[Array, "P C"], weight: Weight, contracted: int, tiles: GroupedTiles) -> int:
    """Bytes of VMEM that a kernel needs: two buffers of each block, and a step's intermediates."""
    weight_format, c, item = WeightFormat.of(weight), rows.shape[1], rows.dtype.itemsize
    values = stored(weight)
    of_weight = tiles.columns * values.shape[2 if contracted else 1] * values.dtype.itemsize
    scales = (
        0 if weight_format.group is None else (c // weight_format.group) * tiles.columns * (4 + 2 * scale_bytes(weight))
    )
    blocks = tiles.rows * c * item + of_weight + tiles.rows * tiles.columns * item
    # Of a chunk: in float32 and in the rows' dtype; and the sums, and their product before it is added.
    chunk = chunk_size(c, contracted, weight_format) * (tiles.columns * (4 + item) + tiles.rows * item)
    return 2 * blocks + scales + chunk + 2 * tiles.rows * tiles.columns * 4


def grouped_bytes(
    rows: Float[Array, "P C"], weight: Weight, contracted: int, sizes: Sequence[int], tiles: GroupedTiles | None = None
) -> int:
    """Read from and written to HBM by one call of the kernel: weights of experts with rows once, rows once for each
    tile of columns, the result once. Of rows and weight only shapes matter."""
    tiles = tiles or default_tiles(rows, weight, contracted)
    m = weight.shape[1 if contracted else 2]
    tiled = -(-rows.shape[0] // tiles.rows)
    read = max(1, -(-sum(sizes) // tiles.rows))
    # One row tile stays in VMEM from one tile of columns to the next.
    times = m // tiles.columns if read > 1 else 1
    row_bytes = tiles.rows * rows.dtype.itemsize
    weights = max(1, sum(n > 0 for n in sizes)) * (weight.nbytes // weight.shape[0])
    return weights + row_bytes * (read * times * rows.shape[1] + tiled * m)
