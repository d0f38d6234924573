"""Experts for small batches on TPUs: one kernel reads each active expert's weights once.

The grid goes over active experts and tiles of F. A step computes act(x w1^T) * (x v1^T) for its tile (N, tile) and adds
its product with those rows of w2 to the sums (N, D) in VMEM. Expert numbers are prefetched as scalars, so the next tile
is copied while this one is used.
"""

from functools import partial
from typing import Any, NamedTuple

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
    in_hbm,
    iota,
    scale_bytes,
    stored,
    tiles_name,
)
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

# Rows are padded to the sublanes of a packed bfloat16 register.
ROWS = 16
MAX_ROWS = 256
# Of one step's three tiles: its reading takes some µs, ten times what a step costs by itself.
STEP_BYTES = 5 << 20


class DecodeTiles(NamedTuple):
    """rows: of w1, v1 and w2 that one step reads, a divisor of F."""

    rows: int


def supports(x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Returns whether :func:`decode_experts` supports these: up to 256 rows, D and F in whole tiles.

    All three weights (E, F, D) are stored in the same way; arrays or shapes of them.
    """
    weight_format, d = WeightFormat.of(w1), x.shape[1]
    if any(WeightFormat.of(w) != weight_format or w.shape != w1.shape for w in (v1, w2)) or x.shape[0] > MAX_ROWS:
        return False
    if x.dtype not in (jnp.bfloat16, jnp.float32) or d % (2 * LANES if weight_format.packed else LANES):
        return False
    if weight_format.group is not None and (LANES % weight_format.group or w1.shape[1] % weight_format.group):
        return False
    return bool(tile_candidates(x, w1))


def tile_candidates(x: Float[Array, "N D"], w1: Weight) -> list[DecodeTiles]:
    """The tiles that are legal for x and weights like w1 (E, F, D) and fit into VMEM, smallest first."""
    weight_format, width = WeightFormat.of(w1), w1.shape[1]
    # Whole registers: 16 rows of bfloat16, 32 of bytes, of which int4 has half as many in w2; lanes, for scales of w1.
    step = LANES if weight_format.group else 32 // stored(w1).dtype.itemsize * (2 if weight_format.packed else 1)
    tiles = [DecodeTiles(rows) for rows in [*range(step, width, step), width] if width % rows == 0 == width % 64]
    return [t for t in tiles if vmem_bytes(x, w1, t) <= MAX_VMEM]


def default_tiles(x: Float[Array, "N D"], w1: Weight) -> DecodeTiles:
    """The table's, else the rule's."""
    found = table().get(tiles_name("experts_tpu", w1, x.shape[0]))
    timed = found is not None and DecodeTiles(*found) in tile_candidates(x, w1)
    return DecodeTiles(*found) if found is not None and timed else rule_tiles(x, w1)


def rule_tiles(x: Float[Array, "N D"], w1: Weight) -> DecodeTiles:
    """The largest tiles whose step reads up to STEP_BYTES, by the bytes of w1's rows; else the smallest there are."""
    candidates = tile_candidates(x, w1)
    fitting = [t for t in candidates if 3 * _tile_bytes(w1, t) <= STEP_BYTES]
    return (fitting or candidates)[-1 if fitting else 0]


def decode_experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "C"],
    count: Int[Array, ""],
    combine_weights: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: DecodeTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """The sum over c < count of combine_weights[c, n] (act(x w1^T) * (x v1^T)) w2 for expert chosen[c], in float32.

    Args:
      x: bfloat16 or float32, up to 256 rows.
      chosen: numbers of different experts; those from `count` on do not matter, and no weight is read for them.
      combine_weights: float32; a row with 0 gets exactly 0 from that expert, even if that is infinite or NaN.
      w1, v1, w2: (E, F, D), arrays of x's dtype or quantised, as :func:`supports` takes them.
      activation: a name of ACTIVATIONS.
      interpret: runs it on a CPU, slowly.
    """
    rows = x.shape[0]
    padding = -rows % ROWS
    x, combine_weights = jnp.pad(x, ((0, padding), (0, 0))), jnp.pad(combine_weights, ((0, 0), (0, padding)))
    tiles = tiles or default_tiles(x, w1)
    chosen, count = chosen.astype(jnp.int32), jnp.reshape(count, 1).astype(jnp.int32)
    operands = decode_operands(x, combine_weights, w1, v1, w2, tiles)
    given = operands._replace(**{name: in_hbm(getattr(operands, name)) for name in ("w1", "v1", "w2")})
    y = pl.pallas_call(
        partial(_kernel, activation=activation, weight_format=WeightFormat.of(w1)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        grid_spec=decode_grid(operands, count, tiles, WeightFormat.of(w1)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MAX_VMEM),
        interpret=interpret,
        name="decode_experts",
    )(chosen, count, *(o for o in given if o is not None))
    return y[:rows]


class DecodeOperands(NamedTuple):
    """Operands of the kernel beside `chosen` and `count`; scales are None for plain weights.

    Args:
      x: (N, D), or (D / 256, N, 256) for int4.
      combine_weights: (N, C).
      w1, v1, w2: values (E, F, D), or as bytes with two int4.
      s1, t1: of w1 and v1: (E, F / tile, 1, tile) per channel, (E, F, D / group) in groups.
      s2: of w2: (E, 1, D) or (E, F / group, D).
    """

    x: Any
    combine_weights: Any
    w1: Any
    v1: Any
    w2: Any
    s1: Any = None
    t1: Any = None
    s2: Any = None


def decode_operands(
    x: Array, combine_weights: Array, w1: Weight, v1: Weight, w2: Weight, tiles: DecodeTiles
) -> DecodeOperands:
    """Reshapes the small operands for the kernel; weights stay in their layout."""
    weight_format = WeightFormat.of(w1)
    if weight_format.packed:
        # Of each 256 the even ones first, as 128 bytes of w1 and v1 give them.
        x = x.reshape(x.shape[0], -1, LANES, 2).transpose(1, 0, 3, 2).reshape(-1, x.shape[0], 2 * LANES)
    values = stored(w1), stored(v1), stored(w2)
    scales = [w.scale for w in (w1, v1, w2) if isinstance(w, QuantizedArray)]
    if not scales:
        return DecodeOperands(x, combine_weights.T, *values)
    s1, t1, s2 = scales
    if weight_format.group is None:
        s1, t1 = (s.reshape(s.shape[0], -1, 1, tiles.rows) for s in (s1, t1))
    else:
        s1, t1 = s1.swapaxes(1, 2), t1.swapaxes(1, 2)
    return DecodeOperands(x, combine_weights.T, *values, s1, t1, s2)


def decode_grid(
    operands: DecodeOperands, count: Int[Array, "1"], tiles: DecodeTiles, weight_format: WeightFormat
) -> pltpu.PrefetchScalarGridSpec:
    """The grid (experts chosen, tiles of F) and which block of each operand a step reads, from (chosen, count)."""
    width, d = operands.w1.shape[1], operands.w2.shape[2]
    rows = operands.combine_weights.shape[0]

    def at(c, chosen, count):
        return jnp.where(count[0] > 0, chosen[c], 0)

    def tile(c, t, chosen, count):
        return at(c, chosen, count), jnp.where(count[0] > 0, t, 0), 0

    def whole(c, t, chosen, count):
        return at(c, chosen, count), 0, 0

    def columns(c, t, chosen, count):
        return at(c, chosen, count), 0, jnp.where(count[0] > 0, t, 0)

    def all_of(array):
        return pl.BlockSpec(array.shape, lambda c, t, chosen, count: (0,) * array.ndim)

    halves = 2 if weight_format.packed else 1
    specs = [
        all_of(operands.x),
        all_of(operands.combine_weights),
        *[pl.BlockSpec((None, tiles.rows, d // halves), tile)] * 2,
        pl.BlockSpec((None, tiles.rows // halves, d), tile),
    ]
    scratch = [pltpu.VMEM((rows, tiles.rows), jnp.float32)] * 2
    if weight_format.scaled:
        if weight_format.group is None:
            into = pl.BlockSpec((None, None, 1, tiles.rows), lambda *step: (*tile(*step), 0))
        else:
            into = pl.BlockSpec((None, d // weight_format.group, tiles.rows), columns)
            scratch += [pltpu.VMEM((d // weight_format.group, tiles.rows), jnp.float32)] * 2
            scratch += [pltpu.VMEM((width // weight_format.group, d), jnp.float32)]
        specs += [into, into, pl.BlockSpec((None, *operands.s2.shape[1:]), whole)]
    # At least one step, which sets the sums to 0.
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(jnp.maximum(count[0], 1), width // tiles.rows),
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, d), lambda c, t, chosen, count: (0, 0)),
        scratch_shapes=scratch,
    )


def _kernel(chosen, count, x, combine_weights, *refs, activation: str, weight_format: WeightFormat):
    """One step: adds expert chosen[c]'s output of one tile of F to y, which is in VMEM all the time."""
    (w1, v1, w2), refs = refs[:3], refs[3:]
    (s1, t1, s2), refs = (refs[:3], refs[3:]) if weight_format.scaled else ((None,) * 3, refs)
    y, gate, up, *rows_of_scales = refs
    c, t = pl.program_id(0), pl.program_id(1)

    @pl.when((c == 0) & (t == 0))
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(c < count[0])
    def _():
        if weight_format.group is not None:
            _keep_scales(s1, t1, s2, rows_of_scales, t)
            s1_, t1_, s2_ = rows_of_scales
        else:
            s1_, t1_, s2_ = s1, t1, s2
        accumulate_gate_up(x, (w1, v1), (s1_, t1_), (gate, up), weight_format)
        inner = ACTIVATIONS[activation](gate[...]) * up[...]
        own = jnp.sum(jnp.where(iota(combine_weights.shape, 1) == c, combine_weights[...], 0), axis=1, keepdims=True)
        inner = jnp.where(own != 0, inner * own, 0).astype(x.dtype)
        accumulate_down(y, inner, w2, s2_, t, weight_format)


def _keep_scales(s1, t1, s2, kept, t) -> None:
    """Copies scales to VMEM in float32, as reading single rows needs 32-bit elements; w2's for a whole expert."""
    kept[0][...], kept[1][...] = s1[...].astype(jnp.float32), t1[...].astype(jnp.float32)

    @pl.when(t == 0)
    def _():
        kept[2][...] = s2[...].astype(jnp.float32)


def _tile_bytes(w1: Weight, tiles: DecodeTiles) -> int:
    """Bytes of the stored values of one tile of a weight."""
    values = stored(w1)
    return tiles.rows * values.shape[2] * values.dtype.itemsize


def vmem_bytes(x: Float[Array, "N D"], w1: Weight, tiles: DecodeTiles) -> int:
    """Bytes of VMEM that the kernel needs: two buffers of each block, and a step's intermediates."""
    weight_format, (_, width, d) = WeightFormat.of(w1), w1.shape
    rows, groups = x.shape[0] + -x.shape[0] % ROWS, weight_format.groups(2 * LANES)
    item = x.dtype.itemsize
    buffers = 2 * (3 * _tile_bytes(w1, tiles) + rows * d * (4 + item))
    scales = (
        0
        if weight_format.group is None
        else (width + 2 * tiles.rows) * d // weight_format.group * (4 + 2 * scale_bytes(w1))
    )
    # Of one product: both factors, and its parts.
    turn = tiles.rows * CHUNK * (item + 4) + groups * rows * (CHUNK * 8 + tiles.rows * (8 + item))
    return buffers + scales + turn + 2 * rows * tiles.rows * 4


def decode_bytes(x: Float[Array, "N D"], w1: Weight, places: int, count: int, tiles: DecodeTiles | None = None) -> int:
    """Read from and written to HBM by one call of the kernel with C places for experts, `count` of them taken.

    The three weights of each of those once; without any, the first tiles of one. Of x and w1 only shapes matter.
    """
    tiles, weight_format = tiles or default_tiles(x, w1), WeightFormat.of(w1)
    (_, width, d), rows = w1.shape, x.shape[0] + -x.shape[0] % ROWS
    small = rows * (d * x.dtype.itemsize + 4 * places + 4 * d)
    item = scale_bytes(w1)
    # w2's scales come whole, all else in tiles of F.
    of_w2 = item * d * (1 if weight_format.group is None else width // weight_format.group)
    of_others = 2 * item * width * (1 if weight_format.group is None else d // weight_format.group)
    tiled = 3 * width // tiles.rows * _tile_bytes(w1, tiles) + of_others
    return small + (count * (tiled + of_w2) if count else tiled * tiles.rows // width + of_w2)
