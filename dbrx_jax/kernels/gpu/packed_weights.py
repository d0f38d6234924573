"""Packed 16-bit views of quantised weights, and dequantising them to bfloat16 in registers on Hopper GPUs.

An int16 holds two int8 or fp8 weights or four int4, and has the element size of the matrix unit's own loads
(ldmatrix, plain and transposed), so weights land where the matmul wants them whichever dimension is contiguous. Each
weight position within the int16 gives one bfloat16 matrix: along the contraction activations are split the same way
beforehand; across it each is another output.

Integers become floats through bfloat16's spacing: 0x4300 is 128, and its low seven bits count up from there. That is
about 2.3 instructions of a lane for an int8 weight and 1.8 for an int4, both exact. An int4 in the upper half of a
byte counts 16 times, which the activations of its position make up for (FACTORS).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

# A factor for the activations of each weight position in an int16.
FACTORS: dict[str, tuple[float, ...]] = {
    "plain": (1.0,),
    "int8": (1.0, 1.0),
    "fp8": (1.0, 1.0),
    "int4": (1.0, 1 / 16, 1.0, 1 / 16),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Stacked weights (E, F, D) as a kernel reads them.

    Attributes:
      bits: (E, A, B) int16, or the weights themselves where they are plain.
      kind: "plain" or of :class:`QuantizedArray`.
      contracted: the dimension that is summed over, 1 (of E, M, C) or 0 (of E, C, M), without E.
      scale: by channel, None where there is none or one for each group.
      groups: scales by group, two neighbours in a uint32: (E, M, C / group / 2) or (E, C / group, M / 2).
      group: int16 along the contraction that share a scale, None without groups.
    """

    bits: Any
    kind: str = dataclasses.field(metadata={"static": True})
    contracted: int = dataclasses.field(metadata={"static": True})
    scale: Any = None
    groups: Any = None
    group: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def inputs(self) -> int:
        """Weight positions that activations are split into."""
        planes = len(FACTORS[self.kind])
        return planes if self.contracted == 1 or planes == 1 else planes // 2

    @property
    def outputs(self) -> int:
        """Outputs of each int16 along the channels."""
        return len(FACTORS[self.kind]) // self.inputs

    @property
    def channels(self) -> int:
        """PackedWeights of output channels."""
        return self.bits.shape[2 - self.contracted]

    @property
    def depth(self) -> int:
        """PackedWeights along the contraction."""
        return self.bits.shape[1 + self.contracted]

    @property
    def period(self) -> int:
        """PackedWeights along the contraction after which scales begin a new uint32; 1 without groups."""
        if self.group is None:
            return 1
        return self.group * (2 if self.contracted == 1 else 1)


def pack(weight: Weight, contracted: int) -> PackedWeights:
    """A stacked weight (E, M, C), contracted 1, or (E, C, M), contracted 0, without copying it (XLA's bitcast)."""
    if not isinstance(weight, QuantizedArray):
        return PackedWeights(weight, "plain", contracted)
    bits = _pairs(weight.values, jnp.int16)
    if weight.group is None:
        return PackedWeights(bits, weight.kind, contracted, weight.scale)
    each = 4 if contracted == 1 else 2  # weights along the contraction in a word of int4
    return PackedWeights(bits, weight.kind, contracted, None, _pairs(weight.scale, jnp.uint32), weight.group // each)


def fits(weight: Weight, contracted: int) -> bool:
    """Returns whether :func:`pack` supports a weight: even sizes, and groups of a size the matrix unit takes."""
    if not isinstance(weight, QuantizedArray):
        return weight.dtype in (jnp.bfloat16, jnp.float32)
    if weight.scale.dtype != jnp.bfloat16 or weight.values.shape[-1] % 2:
        return False
    if weight.group is None:
        return True
    each = 4 if contracted == 1 else 2
    return weight.scale.shape[-1] % 2 == 0 and weight.group // each in (16, 32, 64)


def activations(rows: Array, weight: PackedWeights) -> Array:
    """Splits rows (..., N, C) by weight position: (..., inputs, N, C / inputs), times FACTORS."""
    planes = weight.inputs
    cut = jnp.moveaxis(rows.reshape(*rows.shape[:-1], -1, planes), -1, -3)
    factors = jnp.array(FACTORS[weight.kind][:planes], rows.dtype)
    return cut * factors[:, None, None] if weight.kind == "int4" else cut


def unpack(word: Array, kind: str) -> tuple[Array, ...]:
    """Dequantises int16 values to one bfloat16 array per weight position, before FACTORS; used in kernels."""
    if kind == "fp8":
        upper = lax.shift_right_logical(word & 0x7F00, jnp.int16(4))
        return _fp8((word & 0x7F) << 4, (word & 0x80) << 8), _fp8(upper, word & -0x8000)
    upper = lax.shift_right_logical(word, jnp.int16(8))
    if kind == "int8":
        return _signed(word, 0x7F), _signed(upper, 0x7F)
    return _nibble(word), _signed(word, 0x70), _nibble(upper), _signed(upper, 0x70)


def split_scales(pairs: Array) -> tuple[Array, Array]:
    """The two bfloat16 scales in a uint32, as float32; used in kernels."""
    return _float32(pairs << 16), _float32(pairs & jnp.uint32(0xFFFF0000))


def _pairs(array: Array, dtype: jnp.dtype) -> Array:
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, 2), dtype)


def _signed(word: Array, mask: int) -> Array:
    """The low byte as a signed integer, of whose magnitude only the bits of `mask` count."""
    magnitude, sign = (word & mask) | 0x4300, (word & 0x80) | 0x4300  # the sign makes 128 into 256
    return _bfloat16(magnitude) - _bfloat16(sign)


def _nibble(word: Array) -> Array:
    """The low four bits as a signed integer, by way of 0 to 15, which is 8 more."""
    return _bfloat16((word & 0xF) ^ 0x4308) - jnp.bfloat16(136)


def _fp8(magnitude: Array, sign: Array) -> Array:
    """float8_e4m3fn, its exponent and mantissa (in bits 4 to 10) and sign (in bit 15) where bfloat16 has them.

    With the difference of the biases added, numbers from 2^-6 on are right. Those below, which have no leading 1,
    came out as (1 + m / 8) 2^-7 instead of (m / 8) 2^-6, which is the lesser here and the greater there. None of
    this meets a subnormal bfloat16, which processors treat each in its own way.
    """
    normal = _bfloat16(magnitude + jnp.int16(120 << 7))
    value = jnp.minimum(normal, normal * jnp.bfloat16(2) - jnp.bfloat16(2.0**-6))
    return _bfloat16(lax.bitcast_convert_type(value, jnp.int16) | sign)


def _bfloat16(word: Array) -> Array:
    return lax.bitcast_convert_type(word, jnp.bfloat16)


def _float32(word: Array) -> Array:
    return lax.bitcast_convert_type(word, jnp.float32)
