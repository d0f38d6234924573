"""Unpacking int16 values of packed weights to bfloat16 in registers on Hopper GPUs, for the grouped matmul.

Integers are converted exactly, without a conversion instruction: the bfloat16 with the bits 0x4300 + n is 128 + n, for
n below 128. LLVM takes twice the instructions for shifts of 16-bit pairs, so integers are unpacked by inline assembly,
two weights at a time (PTX): 1.5 to 2 instructions a weight. `unpack` is the same in JAX, for the interpreter.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Instructions that unpack the weights at each position of two int16 ($1) to two bfloat16 ($0), as `_signed` and
# `_nibble` do. The last operand of lop3 is its truth table: 0xea is (a & b) | c, 0x6a is (a & b) ^ c.
_INT8 = """{{ .reg .b32 bits, magnitude, sign;
  shr.b32 bits, $1, {shift};
  lop3.b32 magnitude, bits, 0x007f007f, 0x43004300, 0xea;
  lop3.b32 sign, bits, 0x00800080, 0x43004300, 0xea;
  sub.bf16x2 $0, magnitude, sign; }}"""
_INT4 = """{{ .reg .b32 bits, value, offset;
  shr.b32 bits, $1, {shift};
  lop3.b32 value, bits, 0x000f000f, 0x43084308, 0x6a;
  mov.b32 offset, 0x43084308;
  sub.bf16x2 $0, value, offset; }}"""
PTX = {
    "int8": tuple(_INT8.format(shift=8 * p) for p in range(2)),
    "int4": tuple(_INT4.format(shift=4 * p) for p in range(4)),
}


def unpack(packed: Array, kind: str, position: int) -> Array:
    """Unpacks the weights at one position of int16 values to bfloat16; used in kernels."""
    if kind == "fp8":
        if position == 0:
            return _fp8((packed & 0x7F) << 4, (packed & 0x80) << 8)
        return _fp8(lax.shift_right_logical(packed & 0x7F00, jnp.int16(4)), packed & -0x8000)
    bits = lax.shift_right_logical(packed, jnp.int16(position * (4 if kind == "int4" else 8)))
    return _nibble(bits) if kind == "int4" else _signed(bits)


def unpack_registers(packed: Array, kind: str, position: int) -> Array:
    """Unpacks as :func:`unpack` in fewer instructions; used in kernels that are compiled."""
    if kind not in PTX:
        return unpack(packed, kind, position)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    inline_asm: Any = llvm.inline_asm
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(packed.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def run(_, values: Any) -> Any:
        pair, i32 = ir.VectorType.get((2,), ir.BF16Type.get()), ir.IntegerType.get_signless(32)
        registers = np.empty_like(values.registers)
        for index, register in np.ndenumerate(values.registers):
            bits = mgpu.utils.bitcast(register, i32)
            registers[index] = mgpu.utils.bitcast(inline_asm(i32, [bits], PTX[kind][position], "=r,r"), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return run(packed)


def _signed(bits: Array) -> Array:
    """Converts the low byte, a signed integer, to bfloat16."""
    magnitude, sign = (bits & 0x7F) | 0x4300, (bits & 0x80) | 0x4300  # the sign bit turns 128 into 256
    return _bfloat16(magnitude) - _bfloat16(sign)


def _nibble(bits: Array) -> Array:
    """Converts the low four bits, a signed integer, to bfloat16: value + 8 is in 0 to 15, and 128 + 8 is 136."""
    return _bfloat16((bits & 0xF) ^ 0x4308) - jnp.bfloat16(136)


def _fp8(magnitude: Array, sign: Array) -> Array:
    """Converts float8_e4m3fn whose exponent and mantissa (bits 4 to 10) and sign (bit 15) are at bfloat16's positions.

    Adding the difference of the exponent biases (120) is right for normal numbers, 2^-6 and larger. A subnormal number
    (m / 8) 2^-6 gives (1 + m / 8) 2^-7, and 2 x - 2^-6 corrects that; for normal numbers it is the larger of the two.
    No intermediate is a subnormal bfloat16, which hardware may flush to zero.
    """
    normal = _bfloat16(magnitude + jnp.int16(120 << 7))
    value = jnp.minimum(normal, normal * jnp.bfloat16(2) - jnp.bfloat16(2.0**-6))
    return _bfloat16(lax.bitcast_convert_type(value, jnp.int16) | sign)


def _bfloat16(packed: Array) -> Array:
    return lax.bitcast_convert_type(packed, jnp.bfloat16)
