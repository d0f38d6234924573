"""Loads and unpacks tiles of quantised weights as int8 operands of the matrix unit; used in kernels for Hopper GPUs.

Each function has a part in Mosaic's own operations, on a lane's 32-bit registers of four bytes, and the same in
jax.numpy for Pallas' interpreter, which does not run the former.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from dbrx_jax.kernels.gpu.fixed_point import DIGIT_BASE, DIGITS, LARGEST
from dbrx_jax.kernels.gpu.integer_weights import BLOCK, CHANNELS, IntegerWeights, transposed_order

WGMMA = plgpu.Layout.WGMMA  # of accumulators, and of int16 tiles
_BYTES = plgpu.Layout.WGMMA_8BIT  # of int8 operands: a register has four bytes along the contraction
_load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run these kernels
_UPPER = 0xF0F0F0F0  # the upper four bits of each byte
# Byte permutations of two registers, each two int16 (pairs of channels): the low bytes, and the high bytes.
_CHANNEL_BYTES = (0x6420, 0x7531)


def load_operands(ref: Any, weight: IntegerWeights, interpret: bool) -> list[list[tuple[Any, ...]]]:
    """Loads a tile's operands (CHANNELS, block): for each block of the contraction and each output a tuple.

    A tuple has one operand for each of the parts of the activations of one group; int4 operands are
    INT4_FACTOR times the weights. The block is BLOCK bytes of int4, or the whole tile of int8, which is read from
    shared memory if it is contracted last.

    Args:
      ref: a tile of `weight.bits` in shared memory.
    """
    if weight.contracted == 1:
        if not weight.int4:
            return [[(ref,)]]
        return [[halves] for halves in unpack_int4(_load(ref, layout=_BYTES), interpret)]
    size, n = BLOCK if weight.int4 else ref.shape[0], weight.num_inputs
    blocks = []
    for start in range(0, ref.shape[0], size):
        tile = _load(ref.at[pl.ds(start, size)].transpose((1, 0)), layout=WGMMA)
        parts = split_channels(tile, weight.int4, interpret)
        blocks.append([parts[:n], parts[n:]])
    return blocks


def unpack_int4(tile: Array, interpret: bool) -> list[tuple[Array, ...]]:
    """Unpacks bytes (CHANNELS, depth): for each BLOCK, 16 times the even and 16 times the odd weights, int8."""
    num_blocks = tile.shape[1] // BLOCK
    if interpret:
        blocks = jnp.split(tile, num_blocks, axis=1)
        return [(_as_int8(b << 4), _as_int8(b & 0xF0)) for b in blocks]
    result = plgpu.ShapeDtypeStruct((CHANNELS, BLOCK), jnp.int8, layout=_BYTES)

    @plgpu.inline_mgpu(arg_types=(_BYTES,), return_type=(result,) * (2 * num_blocks))
    def unpack(_: Any, array: Any) -> tuple[Any, ...]:
        blocks = (array[:, start : start + BLOCK] for start in range(0, array.shape[1], BLOCK))
        return tuple(_array(half) for block in blocks for half in _nibbles(_registers(block)))

    halves = unpack(tile)
    return [tuple(halves[i : i + 2]) for i in range(0, len(halves), 2)]


def split_channels(tile: Array, int4: bool, interpret: bool) -> tuple[Array, ...]:
    """Parts pairs of channels, int16 (CHANNELS, depth), in the order of :func:`transposed_order`.

    Returns the even channels and the odd channels as int8; of int4, 16 times the even and the odd weights of each.
    """
    if interpret:
        channels = [transposed_order(c) for c in (tile & 0xFF, lax.shift_right_logical(tile, jnp.int16(8)))]
        halves = [[c << 4, c & 0xF0] if int4 else [c] for c in channels]
        return tuple(_as_int8(h) for pair in halves for h in pair)
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.int8, layout=_BYTES)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=(result,) * (4 if int4 else 2))
    def split(_: Any, array: Any) -> tuple[Any, ...]:
        # A lane has two int16 of each 8 columns, for two of its rows; four bytes of an operand come from 16 columns.
        registers = np.array(_registers(array), object).reshape(-1, 2, 2)
        operands: list[Any] = []
        for selection in _CHANNEL_BYTES:
            pairs = [registers[k, :, row] for k in range(len(registers)) for row in range(2)]
            merged = [_permute(first, second, selection) for first, second in pairs]
            operands += _nibbles(merged) if int4 else [merged]
        return tuple(map(_array, operands))

    return split(tile)


def load_column(ref: Any, column: Array, interpret: bool) -> Array:
    """Loads a column of (CHANNELS, groups) bfloat16 in shared memory as float32, to the lanes with each channel."""
    if interpret:
        return ref[:, column].astype(jnp.float32)
    layout = WGMMA.reduce(1)
    result = plgpu.ShapeDtypeStruct((CHANNELS,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), return_type=result)
    def load(_: Any, ref: Any, column: Any) -> Any:
        short, float32 = ir.IntegerType.get_signless(16), ir.F32Type.get()
        column = arith.index_cast(ir.IndexType.get(), column.registers.item())

        def element(channel: Any) -> Any:
            bits = arith.extui(_int32(), utils.bitcast(memref.load(ref, [channel, column]), short))
            # A bfloat16 is the upper half of the float32 with the same value.
            return utils.bitcast(arith.shli(bits, utils.c(16, _int32())), float32)

        return fragmented_array.FragmentedArray.build((CHANNELS,), layout.to_mgpu(), element)

    return load(ref, column)


def combine_digits(sums: Array, largest: Any, interpret: bool) -> Array:
    """Combines the digits' columns (CHANNELS, 2 N) to rows' values; both columns of a row have them.

    Args:
      largest: largest values of the rows, float32 (N,), in global memory.
    """
    if interpret:
        rows = (DIGIT_BASE * sums[:, ::2] + sums[:, 1::2]) * (largest[...] * (1 / LARGEST))
        return jnp.repeat(rows, DIGITS, axis=1)
    result = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()), return_type=result)
    def combine(_: Any, array: Any, largest: Any) -> Any:
        float32, registers = ir.F32Type.get(), np.empty_like(array.registers)
        indices = array.layout.thread_idxs(array.shape)
        for number, (register, (_, column)) in enumerate(zip(array.registers.flat, indices, strict=True)):
            high, low = (vector.extract(register, [], [i]) for i in range(DIGITS))  # neighbouring columns
            scale = memref.load(largest, [arith.divui(column, utils.c(DIGITS, ir.IndexType.get()))])
            scale = arith.mulf(scale, utils.c(1 / LARGEST, float32))
            value = arith.mulf(arith.addf(arith.mulf(high, utils.c(float(DIGIT_BASE), float32)), low), scale)
            registers.flat[number] = vector.broadcast(register.type, value)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return combine(sums, largest)


def store_rows(ref: Any, outputs: list[Array], interpret: bool) -> None:
    """Stores outputs (CHANNELS, 2 N) as rows of shared memory (N, len(outputs) CHANNELS), alternating along a row.

    Neighbouring columns are equal, as :func:`combine_digits` returns them.
    """
    if interpret:
        ref[...] = jnp.stack([o[:, ::2].T for o in outputs], axis=-1).reshape(ref.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[WGMMA] * len(outputs)))
    def store(_: Any, ref: Any, *arrays: Any) -> None:
        index = ir.IndexType.get()
        for number, array in enumerate(arrays):

            def store_element(value: Any, position: Any, number: int = number) -> None:
                channel, column = position
                place = arith.addi(arith.muli(channel, utils.c(len(arrays), index)), utils.c(number, index))
                memref.store(value, ref, [arith.divui(column, utils.c(2, index)), place])

            array.foreach(store_element)

    store(ref, *outputs)


def _as_int8(values: Array) -> Array:
    """Returns the low bytes as int8; for the interpreter."""
    return lax.bitcast_convert_type((values & 0xFF).astype(jnp.uint8), jnp.int8)


def _int32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _registers(array: Any) -> list[Any]:
    return [utils.bitcast(register, _int32()) for register in array.registers.flat]


def _array(registers: list[Any]) -> Any:
    """Returns the int8 operand (CHANNELS, depth) with these 32-bit registers."""
    layout = _BYTES.to_mgpu()
    depth = 4 * 128 * len(registers) // CHANNELS
    array = np.empty(layout.registers_shape((CHANNELS, depth)), object)
    four_bytes = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    array.flat[:] = [utils.bitcast(register, four_bytes) for register in registers]
    return fragmented_array.FragmentedArray(_registers=array, _layout=layout, _is_signed=True)


def _nibbles(registers: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns 16 times the low and 16 times the high four bits of each byte, in two's complement."""
    mask = utils.c(_UPPER - (1 << 32), _int32())
    low = [arith.andi(arith.shli(r, utils.c(4, _int32())), mask) for r in registers]
    return low, [arith.andi(r, mask) for r in registers]


def _permute(a: Any, b: Any, selection: int) -> Any:
    """Returns the bytes of two registers that a selection names."""
    instruction = f"prmt.b32 $0, $1, $2, {selection:#x};"
    return llvm.inline_asm(_int32(), [a, b], instruction, "=r,r,r", has_side_effects=False)
