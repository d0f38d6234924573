"""A few tokens through their experts on a TPU: one kernel reads each chosen expert's weights once.

For every chosen expert the grid goes over tiles of F. A step reads those rows of w1, v1 and w2, makes the
(N, tile) of act(x w1^T) * (x v1^T) and adds its product with the rows of w2 to the sums (N, D), which stay in
VMEM. Which expert comes when is known before the kernel starts (scalar prefetch), so the next tile is on its way
while this one is used, also from one expert to the next.

Products run on small integers as they are, exact in the activations' dtype, and scales multiply the float32
results. With groups of weights the rows are put under each other once for each group of a chunk, and are zero
outside it: then one product gives the partial sums of all of them, for a matrix unit that is filled with weights
either way.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

LANES = 128
# Rows are filled up to the sublanes of a packed bfloat16 register.
ROWS = 16
MOST_ROWS = 256
# Of one step's three tiles: its reading takes some µs, ten times what a step costs by itself.
STEP_BYTES = 5 << 20
# Of the 128 MiB of a v5e or v6e, and the 64 MiB of a v5p core. The compiler's own limit, 16 MiB, would be spent on the
# two buffers of the tiles.
MOST_VMEM = 48 << 20
# Of D, in one product; and chunks of 256 of it in one turn of int4's loop.
CHUNK = 1024
UNROLL = 4
# Nibbles are left in the upper half of a byte, as 16 times their value.
NIBBLE = 16


class DecodeTiles(NamedTuple):
    """rows: of w1, v1 and w2 that one step reads, a divisor of F."""

    rows: int


class Form(NamedTuple):
    """How a kernel reads a weight.

    Args:
      packed: two values in a byte.
      scaled: has scales.
      group: weights along the contraction that share a scale; None is per channel.
    """

    packed: bool
    scaled: bool
    group: int | None

    @classmethod
    def of(cls, weight: Weight) -> "Form":
        if isinstance(weight, QuantizedArray):
            return cls(weight.kind == "int4", True, weight.group)
        return cls(False, False, None)

    def groups(self, chunk: int) -> int:
        """How many groups lie in a chunk of the contraction."""
        return 1 if self.group is None else chunk // self.group


def supports(x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Whether :func:`decode_experts` takes these: up to 256 rows, D in whole registers, F in whole tiles.

    All three weights (E, F, D) are stored in the same way; arrays or shapes of them.
    """
    form, d = Form.of(w1), x.shape[1]
    if any(Form.of(w) != form or w.shape != w1.shape for w in (v1, w2)) or x.shape[0] > MOST_ROWS:
        return False
    if x.dtype not in (jnp.bfloat16, jnp.float32) or d % (2 * LANES if form.packed else LANES):
        return False
    if form.group is not None and (LANES % form.group or w1.shape[1] % form.group):
        return False
    return bool(tile_candidates(x, w1))


def tile_candidates(x: Float[Array, "N D"], w1: Weight) -> list[DecodeTiles]:
    """The tiles that are legal for x and weights like w1 (E, F, D) and fit into VMEM, smallest first."""
    form, width = Form.of(w1), w1.shape[1]
    # Whole registers: 16 rows of bfloat16, 32 of bytes, of which int4 has half as many in w2; lanes, for scales of w1.
    values = w1.values if isinstance(w1, QuantizedArray) else w1
    step = LANES if form.group else 32 // values.dtype.itemsize * (2 if form.packed else 1)
    tiles = [DecodeTiles(rows) for rows in [*range(step, width, step), width] if width % rows == 0 == width % 64]
    return [t for t in tiles if vmem_bytes(x, w1, t) <= MOST_VMEM]


def default_tiles(x: Float[Array, "N D"], w1: Weight) -> DecodeTiles:
    """The largest tiles whose step reads up to STEP_BYTES, by the bytes of w1's rows; else the smallest there are."""
    candidates = tile_candidates(x, w1)
    fitting = [t for t in candidates if 3 * _tile_bytes(w1, t) <= STEP_BYTES]
    return (fitting or candidates)[-1 if fitting else 0]


def decode_experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "C"],
    count: Int[Array, ""],
    mix: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: DecodeTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """The sum over c < count of mix[c, n] (act(x w1^T) * (x v1^T)) w2 for expert chosen[c], in float32.

    Args:
      x: bfloat16 or float32, up to 256 rows.
      chosen: numbers of different experts; those from `count` on do not matter, and no weight is read for them.
      mix: float32; a row whose number is 0 gets exactly 0 from that expert, even where it is infinite or NaN.
      w1, v1, w2: (E, F, D), arrays of x's dtype or quantised, as :func:`supports` takes them.
      activation: a name of ACTIVATIONS.
      interpret: runs it on a CPU, slowly.
    """
    rows = x.shape[0]
    filled = -rows % ROWS
    x, mix = jnp.pad(x, ((0, filled), (0, 0))), jnp.pad(mix, ((0, 0), (0, filled)))
    tiles = tiles or default_tiles(x, w1)
    chosen, count = chosen.astype(jnp.int32), jnp.reshape(count, 1).astype(jnp.int32)
    operands = decode_operands(x, mix, w1, v1, w2, tiles)
    y = pl.pallas_call(
        partial(_kernel, activation=activation, form=Form.of(w1)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        grid_spec=decode_grid(operands, count, tiles, Form.of(w1)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MOST_VMEM
        ),
        interpret=interpret,
        name="decode_experts",
    )(chosen, count, *(o for o in operands if o is not None))
    return y[:rows]


class DecodeOperands(NamedTuple):
    """What the kernel reads beside `chosen` and `count`; scales are None where weights have none.

    Args:
      x: (N, D), or (D / 256, N, 256) for int4.
      mix: (N, C).
      w1, v1, w2: values (E, F, D), or as bytes with two int4.
      s1, t1: of w1 and v1: (E, F / tile, 1, tile) per channel, (E, F, D / group) in groups.
      s2: of w2: (E, 1, D) or (E, F / group, D).
    """

    x: Any
    mix: Any
    w1: Any
    v1: Any
    w2: Any
    s1: Any = None
    t1: Any = None
    s2: Any = None


def decode_operands(x: Array, mix: Array, w1: Weight, v1: Weight, w2: Weight, tiles: DecodeTiles) -> DecodeOperands:
    """Brings small things into the kernel's arrangement; weights stay as they lie."""
    form = Form.of(w1)
    if form.packed:
        # Of each 256 the even ones first, as 128 bytes of w1 and v1 give them.
        x = x.reshape(x.shape[0], -1, LANES, 2).transpose(1, 0, 3, 2).reshape(-1, x.shape[0], 2 * LANES)
    if not isinstance(w1, QuantizedArray):
        return DecodeOperands(x, mix.T, w1, v1, w2)
    s1, t1, s2 = (w.scale for w in (w1, v1, w2))
    if form.group is None:
        s1, t1 = (s.reshape(s.shape[0], -1, 1, tiles.rows) for s in (s1, t1))
    else:
        s1, t1 = s1.swapaxes(1, 2), t1.swapaxes(1, 2)
    return DecodeOperands(x, mix.T, w1.values, v1.values, w2.values, s1, t1, s2)


def decode_grid(
    operands: DecodeOperands, count: Int[Array, "1"], tiles: DecodeTiles, form: Form
) -> pltpu.PrefetchScalarGridSpec:
    """The grid (experts chosen, tiles of F) and which block of each operand a step reads, from (chosen, count)."""
    width, d = operands.w1.shape[1], operands.w2.shape[2]
    rows = operands.mix.shape[0]

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

    halves = 2 if form.packed else 1
    specs = [
        all_of(operands.x),
        all_of(operands.mix),
        *[pl.BlockSpec((None, tiles.rows, d // halves), tile)] * 2,
        pl.BlockSpec((None, tiles.rows // halves, d), tile),
    ]
    scratch = [pltpu.VMEM((rows, tiles.rows), jnp.float32)] * 2
    if form.scaled:
        if form.group is None:
            into = pl.BlockSpec((None, None, 1, tiles.rows), lambda *step: (*tile(*step), 0))
        else:
            into = pl.BlockSpec((None, d // form.group, tiles.rows), columns)
            scratch += [pltpu.VMEM((d // form.group, tiles.rows), jnp.float32)] * 2
            scratch += [pltpu.VMEM((width // form.group, d), jnp.float32)]
        specs += [into, into, pl.BlockSpec((None, *operands.s2.shape[1:]), whole)]
    # At least one step, which sets the sums to 0.
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(jnp.maximum(count[0], 1), width // tiles.rows),
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, d), lambda c, t, chosen, count: (0, 0)),
        scratch_shapes=scratch,
    )


def _kernel(chosen, count, x, mix, *refs, activation: str, form: Form):
    """One step: adds expert chosen[c]'s output of one tile of F to y, which is in VMEM all the time."""
    (w1, v1, w2), refs = refs[:3], refs[3:]
    (s1, t1, s2), refs = (refs[:3], refs[3:]) if form.scaled else ((None,) * 3, refs)
    y, gate, up, *rows_of_scales = refs
    c, t = pl.program_id(0), pl.program_id(1)

    @pl.when((c == 0) & (t == 0))
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(c < count[0])
    def _():
        if form.group is not None:
            _keep_scales(s1, t1, s2, rows_of_scales, t)
            s1_, t1_, s2_ = rows_of_scales
        else:
            s1_, t1_, s2_ = s1, t1, s2
        _into(x, (w1, v1), (s1_, t1_), (gate, up), form)
        inner = ACTIVATIONS[activation](gate[...]) * up[...]
        own = jnp.sum(jnp.where(iota(mix.shape, 1) == c, mix[...], 0), axis=1, keepdims=True)
        inner = jnp.where(own != 0, inner * own, 0).astype(x.dtype)
        _add_out(y, inner, w2, s2_, t, form)


def _keep_scales(s1, t1, s2, kept, t) -> None:
    """In float32, as single rows are read below, which takes 32 bits an element; w2's are those of a whole expert."""
    kept[0][...], kept[1][...] = s1[...].astype(jnp.float32), t1[...].astype(jnp.float32)

    @pl.when(t == 0)
    def _():
        kept[2][...] = s2[...].astype(jnp.float32)


def _into(x, weights, scales, sums, form: Form) -> None:
    """Puts x w^T, (N, tile), into the sums, for the rows of w1 and v1 in VMEM."""
    for total in sums:
        total[...] = jnp.zeros_like(total)
    if form.packed:
        unroll = math.gcd(x.shape[0], UNROLL)
        _loop(x.shape[0] // unroll, lambda i: _add_packed(x, weights, scales, sums, i * unroll, unroll, form))
    else:
        size = _columns(x.shape[1])

        def add(i):
            part = _part(i, size)
            for w, total in zip(weights, sums, strict=True):
                total[...] += product(x[:, part], w[:, part].astype(x.dtype), 1)

        _loop(x.shape[1] // size, add)
    if form.scaled:
        for s, total in zip(scales, sums, strict=True):
            factor = s[...].astype(jnp.float32) if form.group is None else 1
            total[...] = total[...] * (factor / NIBBLE if form.packed else factor)


def _add_packed(x, weights, scales, sums, first, count: int, form: Form) -> None:
    """Adds `count` chunks of x w^T for int4 w1 and v1, in 16ths."""
    groups, rows = form.groups(2 * LANES), x.shape[1]
    for chunk in range(count):
        own = _by_group(x[first + chunk], lax.rem(iota((rows, 2 * LANES), 1), LANES), LANES // groups, groups)
        part = pl.ds(pl.multiple_of((first + chunk) * LANES, LANES), LANES)
        for w, s, total in zip(weights, scales, sums, strict=True):
            parts = product(own, even_odd(w[:, part], x.dtype), 1)
            total[...] += _scaled_sum(parts, rows, s, (first + chunk) * groups, slice(None), form)


def _by_group(x: Array, lane: Array, size: int, groups: int) -> Array:
    """Rows under each other once for each group of `size` lanes, and 0 in other groups: (groups * N, lanes)."""
    if groups == 1:
        return x
    group = lax.div(lane, size)
    return jnp.concatenate([jnp.where(group == g, x, jnp.zeros_like(x)) for g in range(groups)])


def _scaled_sum(parts: Array, rows: int, s, first, columns, form: Form) -> Array:
    """The sum over groups of (groups * N, M) times their scales, which are rows of s from `first` on."""
    if form.group is None:
        return parts
    pieces = [parts[g : g + rows] for g in range(0, parts.shape[0], rows)]
    return sum(piece * s[pl.ds(first + g, 1), columns] for g, piece in enumerate(pieces))


def _add_out(y, inner: Array, w2, s2, t, form: Form) -> None:
    """Adds inner w2 to y, a few columns at a time; in groups, chunks of F that fill the matrix unit."""
    rows, tile = inner.shape
    depth = tile if form.group is None else math.gcd(tile, 2 * LANES)
    groups, size = form.groups(depth), _columns(y.shape[1])
    owns = [inner[:, f : f + depth] for f in range(0, tile, depth)]
    owns = [_by_group(own, iota((rows, depth), 1), depth // groups, groups) for own in owns]

    def add(i):
        columns = _part(i, size)
        for chunk, own in enumerate(owns):
            stored = depth // 2 if form.packed else depth
            w = w2[chunk * stored : (chunk + 1) * stored, columns]
            w = (pltpu.bitcast(w, jnp.int4) if form.packed else w).astype(inner.dtype)
            first = (t * (tile // depth) + chunk) * groups
            out = _scaled_sum(product(own, w, 0), rows, s2, first, columns, form)
            if form.scaled and form.group is None:
                out = out * s2[:, columns].astype(jnp.float32)
            y[:, columns] += out

    _loop(y.shape[1] // size, add)


def _loop(count: int, body) -> None:
    """A loop in the kernel: written out, these steps take the compiler half a minute a layer."""
    if count == 1:
        body(0)
    else:
        lax.fori_loop(0, count, lambda i, carry: body(i), None)


def _columns(d: int) -> int:
    """Of D, so many at a time."""
    return next(n for n in range(min(CHUNK, d), 0, -LANES) if d % n == 0)


def _part(i, size: int):
    return pl.ds(pl.multiple_of(i * size, size), size)


def even_odd(w: Array, dtype) -> Array:
    """Bytes (tile, 128) to 16 times the even values beside 16 times the odd ones, (tile, 256).

    Taken apart four bytes at a time: a shift of bytes is not to be had.
    """
    words = pltpu.bitcast(w, jnp.int32)
    upper = jnp.int32(-0x0F0F0F10)  # 0xF0F0F0F0
    halves = (words << 4) & upper, words & upper
    return jnp.concatenate([pltpu.bitcast(h, jnp.int8).astype(dtype) for h in halves], axis=1)


def _scale(s: Array, form: Form) -> Array:
    return s.astype(jnp.float32) / NIBBLE if form.packed else s.astype(jnp.float32)


def _transposed(s: Array) -> Array:
    """In float32, by the matrix unit: exact, as all but one of the products are 0."""
    size = s.shape[1]
    return product((iota((size, size), 0) == iota((size, size), 1)).astype(s.dtype), s, 1)


def product(x: Array, w: Array, contracted: int, contracted_x: int = 1) -> Array:
    """x w^T (1) or x w (0) in float32, or with x^T (0); float32 factors are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contracted_x,), (contracted,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], dimension: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


def _tile_bytes(w1: Weight, tiles: DecodeTiles) -> int:
    """Of the stored values of so many rows of one weight."""
    values = w1.values if isinstance(w1, QuantizedArray) else w1
    return tiles.rows * values.shape[2] * values.dtype.itemsize


def vmem_bytes(x: Float[Array, "N D"], w1: Weight, tiles: DecodeTiles) -> int:
    """Of VMEM that a kernel takes: two buffers of each block, and what a step makes on the way."""
    form, (_, width, d) = Form.of(w1), w1.shape
    rows, groups = x.shape[0] + -x.shape[0] % ROWS, form.groups(2 * LANES)
    item = x.dtype.itemsize
    buffers = 2 * (3 * _tile_bytes(w1, tiles) + rows * d * (4 + item))
    scales = 0 if form.group is None else (width + 2 * tiles.rows) * d // form.group * (4 + 2 * w1.scale.dtype.itemsize)
    # Of one product: both factors, and its parts.
    turn = tiles.rows * CHUNK * (item + 4) + groups * rows * (CHUNK * 8 + tiles.rows * (8 + item))
    return buffers + scales + turn + 2 * rows * tiles.rows * 4


def decode_bytes(x: Float[Array, "N D"], w1: Weight, places: int, count: int, tiles: DecodeTiles | None = None) -> int:
    """Read from and written to HBM by one call of the kernel with C places for experts, `count` of them taken.

    The three weights of each of those once; without any, the first tiles of one. Of x and w1 only shapes matter.
    """
    tiles, form = tiles or default_tiles(x, w1), Form.of(w1)
    (_, width, d), rows = w1.shape, x.shape[0] + -x.shape[0] % ROWS
    small = rows * (d * x.dtype.itemsize + 4 * places + 4 * d)
    item = w1.scale.dtype.itemsize if isinstance(w1, QuantizedArray) else 0
    # w2's scales come whole, all else in tiles of F.
    of_w2 = item * d * (1 if form.group is None else width // form.group)
    of_others = 2 * item * width * (1 if form.group is None else d // form.group)
    tiled = 3 * width // tiles.rows * _tile_bytes(w1, tiles) + of_others
    return small + (count * (tiled + of_w2) if count else tiled * tiles.rows // width + of_w2)
