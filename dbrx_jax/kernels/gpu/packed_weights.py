"""Packed 16-bit views of quantised weights, and dequantising them to bfloat16 in registers on Hopper GPUs.

An int16 packs two int8 or fp8 weights or four int4. 16 bits is the element size of the matrix unit's loads (ldmatrix,
plain and transposed), so the registers are right whichever dimension is contiguous. Each weight position within the
int16 gives one bfloat16 matrix. Packed along the contraction, the positions are parts of the contraction, and
activations are split the same way; packed along the channels, each position is another output.

Integers are converted exactly, without a conversion instruction: the bfloat16 with the bits 0x4300 + n is 128 + n, for
n below 128. That takes about 2.3 instructions per int8 weight and 1.8 per int4. An int4 in the upper half of a byte is
unpacked as 16 times its value; the activations of its position are divided by 16 (FACTORS).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

# Factors of the activations of each weight position in an int16, by kind.
FACTORS: dict[str, tuple[float, ...]] = {
    "plain": (1.0,),
    "int8": (1.0, 1.0),
    "fp8": (1.0, 1.0),
    "int4": (1.0, 1 / 16, 1.0, 1 / 16),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Stacked weights (E, M, C) or (E, C, M), M channels and a contraction of C, as kernels read them.

    Attributes:
      bits: int16 values, packed along the last dimension; the weights themselves if plain.
      kind: "plain", or the kind of the :class:`QuantizedArray`.
      contracted: the contracted dimension, not counting E: 1 (of E, M, C) or 0 (of E, C, M).
      scale: scale of each channel; None if plain or with group scales.
      group_scales: pairs of bfloat16 in a uint32: (E, M, C / group / 2) or (E, C / group, M / 2).
      group_depth: packed elements along the contraction that share a scale; None without groups.
    """

    bits: Any
    kind: str = dataclasses.field(metadata={"static": True})
    contracted: int = dataclasses.field(metadata={"static": True})
    scale: Any = None
    group_scales: Any = None
    group_depth: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_outputs(self) -> int:
        """Number of output channels per packed element."""
        return 2 if self.contracted == 0 and self.kind != "plain" else 1

    @property
    def num_inputs(self) -> int:
        """Number of parts that activations are split into by weight position."""
        return len(FACTORS[self.kind]) // self.num_outputs

    @property
    def channels(self) -> int:
        """Number of packed elements along the output channels."""
        return self.bits.shape[2 - self.contracted]

    @property
    def depth(self) -> int:
        """Number of packed elements along the contraction."""
        return self.bits.shape[1 + self.contracted]

    @property
    def period(self) -> int:
        """Number of packed elements along the contraction per uint32 of scales; 1 without groups."""
        if self.group_depth is None:
            return 1
        return self.group_depth * (2 if self.contracted == 1 else 1)


def pack(weight: Weight, contracted: int) -> PackedWeights:
    """Views a stacked weight (E, M, C), contracted 1, or (E, C, M), contracted 0, as packed, without copying it."""
    if not isinstance(weight, QuantizedArray):
        return PackedWeights(weight, "plain", contracted)
    bits = pairs(weight.values, jnp.int16)
    if weight.group is None:
        return PackedWeights(bits, weight.kind, contracted, weight.scale)
    group_depth = weight.group // _int4_per_element(contracted)
    return PackedWeights(bits, weight.kind, contracted, None, pairs(weight.scale, jnp.uint32), group_depth)


def fits(weight: Weight, contracted: int) -> bool:
    """Returns whether :func:`pack` supports a weight: its format, even sizes, and groups that suit the matrix unit."""
    if not isinstance(weight, QuantizedArray):
        return weight.dtype in (jnp.bfloat16, jnp.float32)
    if weight.kind not in FACTORS or weight.scale.dtype != jnp.bfloat16 or weight.values.shape[-1] % 2:
        return False
    if weight.group is None:
        return True
    return weight.scale.shape[-1] % 2 == 0 and weight.group // _int4_per_element(contracted) in (16, 32, 64)


def _int4_per_element(contracted: int) -> int:
    """Returns the number of int4 weights along the contraction in an int16."""
    return 4 if contracted == 1 else 2


def split_activations(rows: Array, weight: PackedWeights) -> Array:
    """Splits rows (..., N, C) by weight position to (..., num_inputs, N, C / num_inputs), times FACTORS."""
    parts = jnp.moveaxis(rows.reshape(*rows.shape[:-1], -1, weight.num_inputs), -1, -3)
    factors = jnp.array(FACTORS[weight.kind][: weight.num_inputs], rows.dtype)
    return parts * factors[:, None, None] if weight.kind == "int4" else parts


def unpack(packed: Array, kind: str) -> tuple[Array, ...]:
    """Unpacks int16 values to one bfloat16 array per weight position, before FACTORS; used in kernels."""
    if kind == "fp8":
        upper = lax.shift_right_logical(packed & 0x7F00, jnp.int16(4))
        return _fp8((packed & 0x7F) << 4, (packed & 0x80) << 8), _fp8(upper, packed & -0x8000)
    upper = lax.shift_right_logical(packed, jnp.int16(8))
    if kind == "int8":
        return _signed(packed, 0x7F), _signed(upper, 0x7F)
    return _nibble(packed), _signed(packed, 0x70), _nibble(upper), _signed(upper, 0x70)


def split_scales(pairs: Array) -> tuple[Array, Array]:
    """Unpacks the two bfloat16 scales in each uint32 to float32 arrays; used in kernels."""
    low = lax.bitcast_convert_type(pairs << 16, jnp.float32)  # a bfloat16 is the upper half of a float32
    high = lax.bitcast_convert_type(pairs & jnp.uint32(0xFFFF0000), jnp.float32)
    return low, high


def pairs(array: Array, dtype: jnp.dtype) -> Array:
    """Views pairs of neighbours in the last dimension as one element of twice the size."""
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, 2), dtype)


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
