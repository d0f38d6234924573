"""Packed views of int8 and int4 weights for integer products on Hopper GPUs, and activations in the same order.

The matrix unit reads int8 operands whose contraction is contiguous. Weights (E, M, C), contracted last, are stored so.
Of weights (E, C, M) a pair of channels is loaded as one int16, and gives two outputs; the contraction is then in the
order of :func:`transposed_order` (integer_operands.py). A byte of int4 weights gives two operands, of the weights with
even and with odd numbers along the contraction.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dbrx_jax.kernels.gpu.packed_weights import pairs
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

CHANNELS = 64  # packed channels of a matrix product, the rows of a wgmma
BLOCK = 64  # bytes along the contraction of a group-scaled product: 128 int4 weights
INT4_FACTOR = 16  # unpacked int4 weights are this many times too large


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerWeights:
    """Stacked int8 or int4 weights, (E, M, C) with contracted 1 or (E, C, M) with contracted 0, as kernels read them.

    Attributes:
      bits: bytes (E, M, depth), or pairs of channels as int16 (E, depth, M / 2).
      int4: a byte has two weights.
      contracted: the contracted dimension, not counting E.
      scale: scale of each channel (E, M); None with group scales.
      group_scales: (E, M, groups) bfloat16, or pairs of channels as uint32 (E, groups, M / 2); None without groups.
      group: weights along the contraction that share a scale; None without groups.
    """

    bits: Any
    int4: bool = dataclasses.field(metadata={"static": True})
    contracted: int = dataclasses.field(metadata={"static": True})
    scale: Any = None
    group_scales: Any = None
    group: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def num_outputs(self) -> int:
        """Number of channels per packed channel."""
        return 1 if self.contracted == 1 else 2

    @property
    def num_inputs(self) -> int:
        """Number of parts that activations are split into: even and odd weights of an int4 byte."""
        return 2 if self.int4 else 1

    @property
    def groups_per_block(self) -> int:
        """Number of groups in BLOCK bytes; 1 without groups."""
        return 1 if self.group is None else 2 * BLOCK // self.group

    @property
    def channels(self) -> int:
        """Number of packed channels."""
        return self.bits.shape[2 - self.contracted]

    @property
    def depth(self) -> int:
        """Number of bytes along the contraction."""
        return self.bits.shape[1 + self.contracted]


def pack(weight: Weight, contracted: int) -> IntegerWeights:
    """Views a stacked int8 or int4 weight as packed, without copying it."""
    assert isinstance(weight, QuantizedArray)
    bits = pairs(weight.values, jnp.int16) if contracted == 0 else weight.values
    if weight.group is None:
        return IntegerWeights(bits, weight.kind == "int4", contracted, weight.scale.reshape(bits.shape[0], -1))
    scales = pairs(weight.scale, jnp.uint32) if contracted == 0 else weight.scale
    return IntegerWeights(bits, True, contracted, None, scales, weight.group)


def fits(weight: Weight, contracted: int) -> bool:
    """Returns whether :func:`pack` and the kernels support a stacked weight (array or shape)."""
    if not isinstance(weight, QuantizedArray) or weight.kind not in ("int8", "int4"):
        return False
    rows, columns = weight.values.shape[1:]
    channels, depth = (rows, columns) if contracted == 1 else (columns // 2, rows)
    if weight.scale.dtype != jnp.bfloat16 or columns % 2 or channels % CHANNELS or depth % BLOCK:
        return False
    if weight.group is None:
        return True
    whole_copies = contracted == 0 or weight.scale.shape[2] % 8 == 0  # TMA copies multiples of 16 bytes
    return weight.group in (32, 64, 128) and whole_copies


def split_activations(digits: Array, weight: IntegerWeights) -> Array:
    """Splits and orders digits (..., N, C) as a weight's bytes are: (..., parts, N, depth).

    Parts are those of each group in a block, the other groups' digits being 0, and in each those of even and of odd
    int4 weights.
    """
    n = weight.num_inputs
    parts = jnp.moveaxis(digits.reshape(*digits.shape[:-1], -1, n), -1, -3)
    if weight.groups_per_block > 1:
        group = jnp.arange(weight.depth) % BLOCK // (BLOCK // weight.groups_per_block)
        in_group = jnp.arange(weight.groups_per_block)[:, None, None, None] == group
        parts = jnp.where(in_group, parts[..., None, :, :, :], 0)
        parts = parts.reshape(*digits.shape[:-2], -1, *parts.shape[-2:])
    return transposed_order(parts) if weight.contracted == 0 else parts


def transposed_order(array: Array) -> Array:
    """Orders each 16 elements of the last dimension as transposed int8 operands are."""
    *batch, n = array.shape
    return array.reshape(*batch, n // 16, 2, 4, 2).swapaxes(-3, -2).reshape(*batch, n)
