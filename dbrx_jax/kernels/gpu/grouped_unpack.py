"""Dequantising packed weights to bfloat16 in registers on Hopper GPUs, for the grouped matmul.

Integers are converted exactly, without a conversion instruction: the bfloat16 with the bits 0x4300 + n is 128 + n, for
n below 128. An int4 in the upper half of a byte is unpacked as 16 times its value; the activations of its position are
divided by 16 (FACTORS).
"""

import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.kernels.gpu.packed_weights import PackedWeights

# Factors of the activations of each weight position in an int16 of int4.
_FACTORS = (1.0, 1 / 16, 1.0, 1 / 16)


def split_activations(rows: Array, weight: PackedWeights) -> Array:
    """Splits rows (N, C) by weight position to (num_inputs, N, C / num_inputs), times FACTORS."""
    parts = jnp.moveaxis(rows.reshape(rows.shape[0], -1, weight.num_inputs), -1, 0)
    factors = jnp.array(_FACTORS[: weight.num_inputs], rows.dtype)
    return parts * factors[:, None, None] if weight.kind == "int4" else parts


def unpack(packed: Array, kind: str, position: int) -> Array:
    """Unpacks the weight at a position of int16 values to bfloat16, before FACTORS; used in kernels."""
    if kind == "fp8":
        if position == 0:
            return _fp8((packed & 0x7F) << 4, (packed & 0x80) << 8)
        return _fp8(lax.shift_right_logical(packed & 0x7F00, jnp.int16(4)), packed & -0x8000)
    num_positions = 4 if kind == "int4" else 2
    if position >= num_positions // 2:
        packed = lax.shift_right_logical(packed, jnp.int16(8))
    if kind == "int8":
        return _signed(packed, 0x7F)
    return _signed(packed, 0x70) if position % 2 else _nibble(packed)


def split_scales(pairs: Array) -> tuple[Array, Array]:
    """Unpacks the two bfloat16 scales in each uint32; used in kernels."""
    low = lax.bitcast_convert_type(pairs << 16, jnp.float32)  # a bfloat16 is the upper half of a float32
    high = lax.bitcast_convert_type(pairs & jnp.uint32(0xFFFF0000), jnp.float32)
    return low.astype(jnp.bfloat16), high.astype(jnp.bfloat16)


def _signed(packed: Array, mask: int) -> Array:
    """Converts the low byte, a signed integer, to bfloat16, using only the bits of `mask` and the sign."""
    magnitude, sign = (packed & mask) | 0x4300, (packed & 0x80) | 0x4300  # the sign bit turns 128 into 256
    return _bfloat16(magnitude) - _bfloat16(sign)


def _nibble(packed: Array) -> Array:
    """Converts the low four bits, a signed integer, to bfloat16: value + 8 is in 0 to 15, and 128 + 8 is 136."""
    return _bfloat16((packed & 0xF) ^ 0x4308) - jnp.bfloat16(136)


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
