"""Packed 16-bit views of quantised weights, as kernels on Hopper GPUs read them to multiply in bfloat16.

An int16 packs two int8 or fp8 weights or four int4. 16 bits is the element size of the matrix unit's loads (ldmatrix,
plain and transposed), so the registers are right whichever dimension is contiguous. Each weight position within the
int16 gives one bfloat16 matrix (grouped_unpack.py). Packed along the contraction, the positions are parts of the
contraction, and activations are split the same way; packed along the channels, each position is another output.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

NUM_POSITIONS = {"plain": 1, "int8": 2, "fp8": 2, "int4": 4}  # weights of a packed element


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
        return NUM_POSITIONS[self.kind] // self.num_outputs

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
    if weight.kind not in NUM_POSITIONS or weight.scale.dtype != jnp.bfloat16 or weight.values.shape[-1] % 2:
        return False
    if weight.group is None:
        return True
    return weight.scale.shape[-1] % 2 == 0 and weight.group // _int4_per_element(contracted) in (16, 32, 64)


def _int4_per_element(contracted: int) -> int:
    """Returns the number of int4 weights along the contraction in an int16."""
    return 4 if contracted == 1 else 2


def split_activations(rows: Array, weight: PackedWeights) -> Array:
    """Splits rows (..., N, C) by the position of their weights to (..., num_inputs, N, C / num_inputs)."""
    return jnp.moveaxis(rows.reshape(*rows.shape[:-1], -1, weight.num_inputs), -1, -3)


def split_scales(pairs: Array) -> tuple[Array, Array]:
    """Unpacks the two bfloat16 scales in each uint32 to float32 arrays; used in kernels."""
    low = lax.bitcast_convert_type(pairs << 16, jnp.float32)  # a bfloat16 is the upper half of a float32
    high = lax.bitcast_convert_type(pairs & jnp.uint32(0xFFFF0000), jnp.float32)
    return low, high


def pairs(array: Array, dtype: jnp.dtype) -> Array:
    """Views pairs of neighbours in the last dimension as one element of twice the size."""
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, 2), dtype)
