"""Storage formats of plain and quantised weights in TPU kernels, and unpacking int4 in VMEM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tile_table import name_of
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

LANES = 128
# Of 128 MiB (v5e, v6e) or 64 MiB (a v5p core). Mosaic's default of 16 MiB has no room for two buffers of each tile.
MAX_VMEM = 48 << 20
CHUNK = 1024  # most elements of a contraction, or columns of a result, in one matmul
INT4_FACTOR = 16  # unpacked int4 values are 16 times too large: they stay in the upper half of a byte
KINDS = ("int8", "fp8", "int4")  # quantisation formats that the kernels support


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

    def num_groups(self, depth: int) -> int:
        """Returns the number of scale groups in `depth` elements of the contraction."""
        return 1 if self.group is None else depth // self.group


def has_kernel(weight: Weight) -> bool:
    """Returns whether kernels exist for a weight's format: plain, or one of KINDS."""
    return not isinstance(weight, QuantizedArray) or weight.kind in KINDS


def stored_values(weight: Weight) -> Array:
    """Returns a quantised weight's values, or a plain weight itself."""
    return weight.values if isinstance(weight, QuantizedArray) else weight


def in_hbm(x: Array) -> Array:
    """Constrains a kernel's operand to HBM: else XLA may first copy all of it to VMEM."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def tiles_name(kernel: str, weight: Weight, rows: int) -> str:
    """Returns the key of a matmul in the table of tile sizes."""
    kind, group = (weight.kind, weight.group) if isinstance(weight, QuantizedArray) else (str(weight.dtype), None)
    return name_of(kernel, kind, group, tuple(weight.shape[1:]), rows)


def scale_bytes(weight: Weight) -> int:
    """Returns the bytes of one scale, 0 for a plain weight."""
    return weight.scale.dtype.itemsize if isinstance(weight, QuantizedArray) else 0


def unpack_even_odd(w: Array, dtype) -> Array:
    """Unpacks int4 bytes (tile, 128) to (tile, 256), times INT4_FACTOR: even elements first, then odd ones.

    Mosaic has no shift of 8-bit integers, so four bytes are shifted as one int32.
    """
    packed = pltpu.bitcast(w, jnp.int32)
    upper_halves = jnp.int32(-0x0F0F0F10)  # 0xF0F0F0F0
    even, odd = (packed << 4) & upper_halves, packed & upper_halves
    return jnp.concatenate([pltpu.bitcast(n, jnp.int8).astype(dtype) for n in (even, odd)], axis=1)


def matmul(x: Array, w: Array, contracted: int, contracted_x: int = 1) -> Array:
    """Computes x w^T (contracted 1) or x w (0) in float32; contracted_x 0 transposes x."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # by default float32 is rounded to bfloat16
    dims = (((contracted_x,), (contracted,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], dimension: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


def expand_row_scales(scales, k, size: int, group: int) -> Array:
    """Repeats scales (groups, tile) to (tile, size) for chunk k of a weight (M, C) unpacked by unpack_even_odd.

    Computed by a matmul with a selection matrix, which is exact: all but one of the products are 0.
    """
    shape = scales.shape[0], size
    group_of_column = k * (size // group) + lax.div(lax.rem(iota(shape, 1), LANES), group // 2)
    selection = (iota(shape, 0) == group_of_column).astype(scales.dtype)
    return matmul(scales[...], selection, 0, 0) / INT4_FACTOR


def expand_column_scales(scales: Array, first, size: int, group: int) -> Array:
    """Repeats scales (groups, columns) to (size, columns) for rows `first` … first + size - 1 of a weight (C, M)."""
    shape = scales.shape[0], size
    selection = (iota(shape, 0) == lax.div(first + iota(shape, 1), group)).astype(scales.dtype)
    return matmul(selection, scales, 0, 0)


def loop(count: int, body: Callable[[Any], None]) -> None:
    """Runs a loop in the kernel: Mosaic takes half a minute per layer to compile long steps unrolled."""
    if count == 1:
        body(0)
    else:
        lax.fori_loop(0, count, lambda i, carry: body(i), None)


def chunk_size(size: int) -> int:
    """Returns the largest divisor of a size up to CHUNK in steps of LANES."""
    return next(n for n in range(min(CHUNK, size), 0, -LANES) if size % n == 0)


def chunk_slice(i, size: int):
    """Returns the i-th slice of a size; the hint tells Mosaic that its start is aligned."""
    return pl.ds(pl.multiple_of(i * size, size), size)
