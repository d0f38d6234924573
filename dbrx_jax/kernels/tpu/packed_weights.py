"""Reading plain and quantised weights in TPU kernels, and dequantising them in VMEM."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tile_table import name_of
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

LANES = 128
# Of the 128 MiB of a v5e or v6e, and the 64 MiB of a v5p core. The compiler's own limit, 16 MiB, would be spent on the
# two buffers of the tiles.
MAX_VMEM = 48 << 20
# Of a contraction or of a result's columns, in one product.
CHUNK = 1024
# Nibbles are left in the upper half of a byte, as 16 times their value.
NIBBLE = 16


class WeightFormat(NamedTuple):
    """Storage format of a weight.

    Args:
      packed: two values in a byte.
      scaled: has scales.
      group: weights along the contraction that share a scale; None is per channel.
    """

    packed: bool
    scaled: bool
    group: int | None

    @classmethod
    def of(cls, weight: Weight) -> "WeightFormat":
        if isinstance(weight, QuantizedArray):
            return cls(weight.kind == "int4", True, weight.group)
        return cls(False, False, None)

    def groups(self, chunk: int) -> int:
        """Number of scale groups in a chunk of the contraction."""
        return 1 if self.group is None else chunk // self.group


def stored(weight: Weight) -> Array:
    """A plain weight, or a quantised one's values."""
    return weight.values if isinstance(weight, QuantizedArray) else weight


def in_hbm(x: Array) -> Array:
    """An operand of a kernel that reads parts of it: else XLA may first bring all of it to the chip's memory."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def tiles_name(kernel: str, weight: Weight, rows: int) -> str:
    """Name of a matmul in the table of tile sizes."""
    kind, group = (weight.kind, weight.group) if isinstance(weight, QuantizedArray) else (str(weight.dtype), None)
    return name_of(kernel, kind, group, tuple(weight.shape[1:]), rows)


def scale_bytes(weight: Weight) -> int:
    """Bytes of one scale; 0 for a plain weight."""
    return weight.scale.dtype.itemsize if isinstance(weight, QuantizedArray) else 0


def even_odd(w: Array, dtype) -> Array:
    """Bytes (tile, 128) to 16 times the even values beside 16 times the odd ones, (tile, 256).

    Taken apart four bytes at a time: a shift of bytes is not to be had.
    """
    words = pltpu.bitcast(w, jnp.int32)
    upper = jnp.int32(-0x0F0F0F10)  # 0xF0F0F0F0
    halves = (words << 4) & upper, words & upper
    return jnp.concatenate([pltpu.bitcast(h, jnp.int8).astype(dtype) for h in halves], axis=1)


def product(x: Array, w: Array, contracted: int, contracted_x: int = 1) -> Array:
    """x w^T (1) or x w (0) in float32, or with x^T (0); float32 factors are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contracted_x,), (contracted,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], dimension: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
