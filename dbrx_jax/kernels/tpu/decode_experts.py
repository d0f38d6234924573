"""Decode experts on TPUs: one kernel for small batches, which reads each active expert's weights once.

The grid goes over active experts and tiles of F. A step adds (act(x w1^T) * (x v1^T)) w2, for its tile of the three
weights, to the sums (N, D) in VMEM. Expert ids are prefetched as scalars, so the next tile is copied during a step.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.tile_table import table
from dbrx_jax.kernels.tpu.accumulate import accumulate_down, accumulate_gate_up
from dbrx_jax.kernels.tpu.packed_weights import (
    CHUNK,
    LANES,
    MAX_VMEM,
    WeightFormat,
    has_kernel,
    in_hbm,
    iota,
    scale_bytes,
    stored_values,
    tiles_name,
)
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

ROWS = 16  # rows of a bfloat16 register, (16, 128): x is padded to a multiple
MAX_ROWS = 256
STEP_BYTES = 5 << 20  # of a step's three weight tiles: reading them takes some µs, ten times a step's overhead


class DecodeTiles(NamedTuple):
    """Tile size: rows of w1, v1 and w2 that one step reads, a divisor of F."""

    rows: int


def supports(x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Returns whether :func:`decode_experts` supports these arrays (or shapes): up to 256 rows, whole tiles of D and F.

    All three weights (E, F, D) must have the same storage format, one that the kernel can dequantise.
    """
    weight_format, d = WeightFormat.of(w1), x.shape[1]
    if any(not has_kernel(w) or WeightFormat.of(w) != weight_format or w.shape != w1.shape for w in (w1, v1, w2)):
        return False
    if x.dtype not in (jnp.bfloat16, jnp.float32) or d % (2 * LANES if weight_format.packed else LANES):
        return False
    if weight_format.group is not None and (LANES % weight_format.group or w1.shape[1] % weight_format.group):
        return False
    return x.shape[0] <= MAX_ROWS and bool(tile_candidates(x, w1))


def tile_candidates(x: Float[Array, "N D"], w1: Weight) -> list[DecodeTiles]:
    """Returns the valid tile sizes for x and weights like w1 (E, F, D) that fit into VMEM, in ascending order."""
    weight_format, width = WeightFormat.of(w1), w1.shape[1]
    if width % 64:
        return []
    # Mosaic's blocks are whole registers: of w2, 16 rows of bfloat16, 32 of bytes or 64 of int4; of scales, lanes.
    register_rows = 32 // stored_values(w1).dtype.itemsize * (2 if weight_format.packed else 1)
    multiple = LANES if weight_format.group else register_rows
    tiles = [DecodeTiles(rows) for rows in [*range(multiple, width, multiple), width] if width % rows == 0]
    return [t for t in tiles if vmem_bytes(x, w1, t) <= MAX_VMEM]


def default_tiles(x: Float[Array, "N D"], w1: Weight) -> DecodeTiles:
    """Returns the table's tile sizes if they are valid, else those of the rule."""
    tuned = table().get(tiles_name("experts_tpu", w1, x.shape[0]))
    return next((t for t in tile_candidates(x, w1) if list(t) == tuned), rule_tiles(x, w1))


def rule_tiles(x: Float[Array, "N D"], w1: Weight) -> DecodeTiles:
    """Returns the largest candidate whose step reads up to STEP_BYTES, or else the smallest candidate."""
    candidates = tile_candidates(x, w1)
    fitting = [t for t in candidates if 3 * _tile_bytes(w1, t) <= STEP_BYTES]
    return fitting[-1] if fitting else candidates[0]


def decode_experts(
    x: Float[Array, "N D"],
    active: Int[Array, "C"],
    num_active: Int[Array, ""],
    combine_weights: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: DecodeTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """Returns the sum of combine_weights[c, n] (act(x w1^T) * (x v1^T)) w2 over the active experts, in float32.

    Args:
      x: bfloat16 or float32, up to 256 rows.
      active: ids of different experts, of which the first `num_active` are active; weights of the others are not read.
      combine_weights: float32; 0 leaves the expert's output out, even if it is infinite or NaN.
      w1, v1, w2: (E, F, D), arrays of x's dtype or quantised, as :func:`supports` accepts them.
      activation: a name of ACTIVATIONS.
      interpret: interprets the kernel on a CPU.
    """
    num_rows = x.shape[0]
    padding = -num_rows % ROWS
    x, combine_weights = jnp.pad(x, ((0, padding), (0, 0))), jnp.pad(combine_weights, ((0, 0), (0, padding)))
    tiles, weight_format = tiles or default_tiles(x, w1), WeightFormat.of(w1)
    active, num_active = active.astype(jnp.int32), jnp.reshape(num_active, 1).astype(jnp.int32)
    operands = decode_operands(x, combine_weights, w1, v1, w2, tiles)
    y = pl.pallas_call(
        partial(_kernel, activation=activation, weight_format=weight_format),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        grid_spec=decode_grid(operands, num_active, tiles, weight_format),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MAX_VMEM),
        interpret=interpret,
        name="decode_experts",
    )(active, num_active, *operands[:2], *map(in_hbm, operands[2:5]), *operands[5:])
    return y[:num_rows]


def decode_operands(
    x: Array, combine_weights: Array, w1: Weight, v1: Weight, w2: Weight, tiles: DecodeTiles
) -> list[Array]:
    """Reshapes the small operands for the kernel; weights stay in their layout.

    Returns:
      x, (N, D), or (D / 256, N, 256) for int4; combine_weights (N, C); values of w1, v1 and w2; if quantised, scales of
      w1 and v1, (E, F / tile, 1, tile) per channel or (E, D / group, F), and of w2, (E, 1, D) or (E, F / group, D).
    """
    weight_format = WeightFormat.of(w1)
    if weight_format.packed:
        # In each chunk of 256, elements with an even index first: the order in which unpack_even_odd unpacks 128 bytes.
        x = x.reshape(x.shape[0], -1, LANES, 2).transpose(1, 0, 3, 2).reshape(-1, x.shape[0], 2 * LANES)
    operands = [x, combine_weights.T, stored_values(w1), stored_values(v1), stored_values(w2)]
    scales = [w.scale for w in (w1, v1, w2) if isinstance(w, QuantizedArray)]
    if not scales:
        return operands
    if weight_format.group is None:
        gate_up_scales = [s.reshape(s.shape[0], -1, 1, tiles.rows) for s in scales[:2]]
    else:
        gate_up_scales = [s.swapaxes(1, 2) for s in scales[:2]]
    return [*operands, *gate_up_scales, scales[2]]


def decode_grid(
    operands: list[Array], num_active: Int[Array, "1"], tiles: DecodeTiles, weight_format: WeightFormat
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid (active experts, tiles of F) and the block specs of the operands."""
    x, combine_weights, w1, _, w2, *scales = operands
    num_rows, width, d = combine_weights.shape[0], w1.shape[1], w2.shape[2]

    def expert_and_tile(c, t, active, num_active):
        is_active = num_active[0] > 0
        return jnp.where(is_active, active[c], 0), jnp.where(is_active, t, 0)

    def row_tile(*step):
        return *expert_and_tile(*step), 0

    def column_tile(*step):
        expert, tile = expert_and_tile(*step)
        return expert, 0, tile

    values_per_byte = 2 if weight_format.packed else 1
    specs = [
        *[pl.BlockSpec(a.shape, lambda *step, ndim=a.ndim: (0,) * ndim) for a in (x, combine_weights)],
        *[pl.BlockSpec((None, tiles.rows, d // values_per_byte), row_tile)] * 2,
        pl.BlockSpec((None, tiles.rows // values_per_byte, d), row_tile),
    ]
    scratch = [pltpu.VMEM((num_rows, tiles.rows), jnp.float32)] * 2
    if scales:
        if weight_format.group is None:
            gate_up_scales = pl.BlockSpec((None, None, 1, tiles.rows), lambda *step: (*row_tile(*step), 0))
        else:
            gate_up_scales = pl.BlockSpec((None, d // weight_format.group, tiles.rows), column_tile)
            scratch += [pltpu.VMEM((d // weight_format.group, tiles.rows), jnp.float32)] * 2
            scratch += [pltpu.VMEM((width // weight_format.group, d), jnp.float32)]
        down_scales = pl.BlockSpec((None, *scales[2].shape[1:]), lambda *step: (expert_and_tile(*step)[0], 0, 0))
        specs += [gate_up_scales, gate_up_scales, down_scales]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(jnp.maximum(num_active[0], 1), width // tiles.rows),  # at least one step, which sets the sums to 0
        in_specs=specs,
        out_specs=pl.BlockSpec((num_rows, d), lambda *step: (0, 0)),
        scratch_shapes=scratch,
    )


def _kernel(active, num_active, x, combine_weights, w1, v1, w2, *refs, activation: str, weight_format: WeightFormat):
    """Adds the output of one expert for one tile of F to y, which stays in VMEM in all steps."""
    scales, (y, gate, up, *float32_scales) = (refs[:3], refs[3:]) if weight_format.scaled else ((None,) * 3, refs)
    c, t = pl.program_id(0), pl.program_id(1)

    @pl.when((c == 0) & (t == 0))
    def _():
        y[...] = jnp.zeros_like(y)

    def cast_scales(i):
        float32_scales[i][...] = scales[i][...].astype(jnp.float32)

    @pl.when(c < num_active[0])
    def _():
        if float32_scales:  # Mosaic loads a single row at a dynamic index only of 32-bit elements
            cast_scales(0)
            cast_scales(1)
            pl.when(t == 0)(lambda: cast_scales(2))  # w2's block has the scales of all tiles
        *gate_up_scales, down_scales = float32_scales or scales
        accumulate_gate_up(x, (w1, v1), gate_up_scales, (gate, up), weight_format)
        inner = ACTIVATIONS[activation](gate[...]) * up[...]
        # Mosaic slices lanes only at multiples of 128, so a masked sum takes column c.
        is_column = iota(combine_weights.shape, 1) == c
        factors = jnp.sum(jnp.where(is_column, combine_weights[...], 0), axis=1, keepdims=True)
        inner = jnp.where(factors != 0, inner * factors, 0).astype(x.dtype)
        accumulate_down(y, inner, w2, down_scales, t, weight_format)


def _tile_bytes(w1: Weight, tiles: DecodeTiles) -> int:
    """Returns the bytes of the stored values of one tile of a weight."""
    values = stored_values(w1)
    return tiles.rows * values.shape[2] * values.dtype.itemsize


def vmem_bytes(x: Float[Array, "N D"], w1: Weight, tiles: DecodeTiles) -> int:
    """Returns the bytes of VMEM that the kernel needs: two buffers of each block, and a step's intermediates."""
    weight_format, (_, width, d) = WeightFormat.of(w1), w1.shape
    num_rows, itemsize = x.shape[0] + -x.shape[0] % ROWS, x.dtype.itemsize
    num_groups = weight_format.num_groups(2 * LANES)
    buffers = 2 * (3 * _tile_bytes(w1, tiles) + num_rows * d * (4 + itemsize))
    scales = 0
    if weight_format.group is not None:
        scales = (width + 2 * tiles.rows) * d // weight_format.group * (4 + 2 * scale_bytes(w1))
    weight_chunk = tiles.rows * CHUNK * (itemsize + 4)
    partial_sums = num_groups * num_rows * (CHUNK * 8 + tiles.rows * (8 + itemsize))  # and the repeated rows
    return buffers + scales + weight_chunk + partial_sums + 2 * num_rows * tiles.rows * 4


def decode_bytes(
    x: Float[Array, "N D"], w1: Weight, capacity: int, num_active: int, tiles: DecodeTiles | None = None
) -> int:
    """Returns the HBM bytes that :func:`decode_experts` reads and writes for `num_active` of C = `capacity` experts.

    Weights of active experts are read once; if none is active, the first tiles of expert 0. x and w1 may be shapes.
    """
    tiles, weight_format = tiles or default_tiles(x, w1), WeightFormat.of(w1)
    (_, width, d), num_rows = w1.shape, x.shape[0] + -x.shape[0] % ROWS
    activations = num_rows * (d * x.dtype.itemsize + 4 * capacity + 4 * d)  # x, combine weights and y
    scales_per_channel = 1 if weight_format.group is None else width // weight_format.group
    scales_per_row = 1 if weight_format.group is None else d // weight_format.group
    down_scales = scale_bytes(w1) * d * scales_per_channel  # not tiled
    tiled = 3 * width // tiles.rows * _tile_bytes(w1, tiles) + 2 * scale_bytes(w1) * width * scales_per_row
    if num_active == 0:
        return activations + tiled * tiles.rows // width + down_scales
    return activations + num_active * (tiled + down_scales)
