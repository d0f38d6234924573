"""Rounds rows to fixed point in one kernel on Hopper GPUs, in the order of the weights that they are multiplied by.

XLA makes two or three kernels of it: the row's function, its largest value, and the digits. Here a thread block
computes a row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from dbrx_jax.kernels.gpu.fixed_point import DIGIT_BASE, DIGITS, LARGEST, FixedPoint, to_fixed_point
from dbrx_jax.kernels.gpu.integer_weights import BLOCK, IntegerWeights, split_activations

_LANES = 128


def fixed_point_rows(
    compute: Callable[..., Array],
    inputs: Sequence[Array],
    size: int,
    num_entries: Array | None,
    weight: IntegerWeights,
    interpret: Any = None,
) -> FixedPoint:
    """Computes a function of rows in float32 and rounds it to fixed point, split as a weight's bytes are.

    Args:
      compute: takes a row (K,) of each input, in float32, and returns a row.
      inputs: arrays (I, S, N, K); rows are summed over S.
      size: number of rows of an entry of the result, at least N; those from N on are undefined.
      num_entries: entries from here on are undefined; None: none is.

    Returns:
      Digits (I, parts, 2 size, depth), and the largest value of each row (I, size). XLA computes rows whose length is
      not a multiple of a warp group's lanes.
    """
    if inputs[0].shape[3] % _LANES:
        rows = compute(*(jnp.sum(a.astype(jnp.float32), axis=1) for a in inputs))
        x = to_fixed_point(jnp.pad(rows, ((0, 0), (0, size - rows.shape[1]), (0, 0))))
        return FixedPoint(split_activations(x.digits, weight), x.largest)
    entries, _, num_rows, _ = inputs[0].shape

    counts = [] if num_entries is None else [jnp.reshape(num_entries, 1).astype(jnp.int32)]

    def body(*refs):
        input_refs, (digits_ref, largest_ref) = refs[len(counts) : -2], refs[-2:]
        entry, row = lax.axis_index("entry"), lax.axis_index("row")

        @pl.when(entry < refs[0][0] if counts else True)
        def _():
            value = compute(*(_load_row(ref.at[entry], row) for ref in input_refs))
            store_fixed_point(digits_ref.at[entry], largest_ref.at[entry], row, value, weight, bool(interpret))

    body.__name__ = "fixed_point_rows"
    digits, largest = plgpu.kernel(
        body,
        out_type=fixed_point_shapes(entries, size, weight),
        grid=(entries, num_rows),
        grid_names=("entry", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(*counts, *inputs)
    return FixedPoint(digits, largest)


def _load_row(ref: Any, row: Array) -> Array:
    """Loads row `row` of (S, N, K), summed over S, in float32."""
    load: Any = plgpu.load
    rows = [load(ref.at[s, row], layout=row_layout(ref.shape[2:]), optimized=False) for s in range(ref.shape[0])]
    return sum((r.astype(jnp.float32) for r in rows[1:]), rows[0].astype(jnp.float32))


def fixed_point_shapes(entries: int, size: int, weight: IntegerWeights) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the digits and the largest values of entries of `size` rows for a weight."""
    digits = entries, weight.num_inputs * weight.groups_per_block, DIGITS * size, weight.depth
    return [jax.ShapeDtypeStruct(digits, jnp.int8), jax.ShapeDtypeStruct((entries, size), jnp.float32)]


def store_fixed_point(
    digits: Any, largest: Any, row: Array | int, value: Array, weight: IntegerWeights, interpret: bool
) -> None:
    """Rounds a row of K elements to fixed point and stores it; used in kernels.

    Args:
      digits: (parts, 2 N, depth), in the order of :func:`split_activations`.
      largest: (N,).
      row: its number.
      value: float32, of one or two dimensions, in a layout that is strided over the lanes.
    """
    maximum = jnp.max(jnp.abs(value))
    largest[row] = maximum
    factor = LARGEST / jnp.where(maximum == 0, jnp.float32(1), maximum)
    numbers = jnp.round(value * factor, 0).astype(jnp.int32)
    _store_digits(digits, jnp.int32(row), numbers, weight, interpret)


def row_layout(shape: tuple[int, ...]) -> Any:
    """Returns the layout of a row of one or two dimensions: strided over the lanes, with up to four neighbours each."""
    length = math.prod(shape)
    vector = next(n for n in (4, 2, 1) if length % (n * _LANES) == 0)
    return plgpu.Layout.WG_STRIDED(shape, vec_size=vector)


def _store_digits(ref: Any, row: Array, numbers: Array, weight: IntegerWeights, interpret: bool) -> None:
    """Stores the digits of a row of numbers in (parts, 2 N, depth), as :func:`split_activations` orders them."""
    if interpret:
        numbers = numbers.reshape(-1)
        high = (numbers + DIGIT_BASE // 2) >> 7
        digits = jnp.stack([high, numbers - DIGIT_BASE * high]).astype(jnp.int8)
        ref[:, pl.ds(DIGITS * row, DIGITS), :] = split_activations(digits, weight)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), row_layout(numbers.shape)))
    def store(_: Any, ref: Any, row: Any, array: Any) -> None:
        integer, index, byte = (ir.IntegerType.get_signless(32), ir.IndexType.get(), ir.IntegerType.get_signless(8))

        def constant(value: int) -> Any:
            return utils.c(value, integer)

        def store_number(number: Any, position: Any) -> None:
            k = arith.index_cast(integer, position[-1])
            if len(position) == 2:
                k = arith.addi(k, arith.muli(arith.index_cast(integer, position[0]), constant(numbers.shape[1])))
            high = arith.shrsi(arith.addi(number, constant(DIGIT_BASE // 2)), constant(7))
            low = arith.subi(number, arith.muli(high, constant(DIGIT_BASE)))
            place, part = k, constant(0)
            if weight.int4:
                place, part = arith.shrui(k, constant(1)), arith.andi(k, constant(1))
            group = arith.divui(arith.andi(place, constant(BLOCK - 1)), constant(BLOCK // weight.groups_per_block))
            if weight.contracted == 0:
                place = _transposed_place(place, constant)
            for g in range(weight.groups_per_block):
                is_here = arith.cmpi(arith.CmpIPredicate.eq, group, constant(g))
                part_index = arith.index_cast(index, arith.addi(part, constant(g * weight.num_inputs)))
                for digit, value in enumerate((high, low)):
                    value = arith.trunci(byte, arith.select(is_here, value, constant(0)))
                    column = arith.addi(arith.muli(row.registers.item(), constant(DIGITS)), constant(digit))
                    indices = [part_index, arith.index_cast(index, column), arith.index_cast(index, place)]
                    memref.store(value, ref, indices)

        array.foreach(store_number)

    store(ref, row, numbers)


def _transposed_place(place: Any, constant: Callable[[int], Any]) -> Any:
    """Returns the place of an element along the contraction in :func:`integer_weights.transposed_order`.

    Bits 3, 2 and 1, 0 of a place (half, pair, element) become bits 1, 3 and 2, 0.
    """
    half = arith.andi(arith.shrui(place, constant(2)), constant(2))
    pair = arith.andi(arith.shli(place, constant(1)), constant(12))
    rest = arith.andi(place, constant(~14))
    return arith.ori(arith.ori(half, pair), rest)
