"""QuantizedArray: an array stored as low-precision values and scales."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from dbrx_jax.errors import QuantizationError
from dbrx_jax.quantization.formats import Format, Kind, join_words

SCALE_DTYPES = ("bfloat16", "float32")
MIN_GROUP = 8
VALUE_DTYPES = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),  # two per byte
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array as values and scales, which are numpy arrays, JAX arrays, ShapeDtypeStructs, or partition specs.

    Args:
      values: int8, or float8_e4m3fn (fp8), of the array's shape. int4: uint8, in which element 2k along the
        last contracted dimension has the low four bits and 2k + 1 the high, in two's complement from -7 to
        7, so that dimension is halved.
      scale: of the activations' dtype and the values' rank. Per channel, its contracted dimensions are 1;
        in groups, its last contracted dimension is their number, and others are the array's.
      kind: see :class:`Format`.
      contracted: the dimensions that a matmul sums over, counted from the end, ascending.
      group: number of weights along the last contracted dimension that share a scale; None: per channel.
    """

    values: Any
    scale: Any
    kind: Kind = dataclasses.field(metadata={"static": True})
    contracted: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised array."""
        shape = list(self.values.shape)
        shape[self.contracted[-1]] *= 2 if self.kind == "int4" else 1
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dequantised array."""
        return np.dtype(self.scale.dtype)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values and scales together."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in (self.values, self.scale))

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Returns elements of the first dimension, by a number, slice or array; it must not be contracted."""
        if index is Ellipsis:
            return self
        if isinstance(index, tuple) or -self.ndim in self.contracted:
            raise IndexError("only the first dimension can be indexed, where nothing is summed over it")
        return dataclasses.replace(self, values=self.values[index], scale=self.scale[index])

    def scale_splits(self, dimension: int) -> bool:
        """Returns whether sharding the values along a dimension shards the scale too."""
        d = dimension % self.ndim - self.ndim
        if d not in self.contracted:
            return True
        return self.group is not None and (d != self.contracted[-1] or self.group <= self.shape[d])

    def integers(self) -> Any:
        """Returns the values without their scales in the array's shape, int4 unpacked to int8."""
        return unpack(self.values, self.contracted[-1]) if self.kind == "int4" else self.values

    def dequantize(self, dtype: DTypeLike | None = None) -> Any:
        """Returns the values times the scales: in float32, rounded once to a dtype (the scales' by default)."""
        dtype = self.scale.dtype if dtype is None else dtype
        return scaled(self.integers(), self.scale, self.contracted[-1], dtype)


def abstract(shape: tuple[int, ...], format: Format, contracted: tuple[int, ...], dtype: DTypeLike) -> QuantizedArray:
    """Returns the result of quantising an array of this shape, as ShapeDtypeStructs.

    Raises:
      QuantizationError: the contraction does not divide into groups of that size, or scales cannot be of the dtype.
    """
    if np.dtype(dtype).name not in SCALE_DTYPES:
        raise QuantizationError(
            f"quantization: its weights are used in {join_words(SCALE_DTYPES)}, got {np.dtype(dtype)}; choose a dtype"
        )
    d = contracted[-1]
    values, scale, group = list(shape), list(shape), None
    if format.kind == "int4":
        if shape[d] % 2:
            raise QuantizationError(f"quantization: int4 needs an even number along the contraction, got {shape[d]}")
        values[d] //= 2
    if format.group is None:
        for dimension in contracted:
            scale[dimension] = 1
    else:
        scale[d] = group_count(shape[d], format.group)
        group = shape[d] // scale[d]
    return QuantizedArray(
        jax.ShapeDtypeStruct(tuple(values), VALUE_DTYPES[format.kind]),
        jax.ShapeDtypeStruct(tuple(scale), np.dtype(dtype)),
        format.kind,
        contracted,
        group,
    )


def group_count(n: int, group: int) -> int:
    """Returns the least number of equal groups of a contraction of n, each of an even size up to `group`.

    Raises:
      QuantizationError: the groups would be smaller than MIN_GROUP.
    """
    for count in range(-(-n // group), n // MIN_GROUP + 1):
        if n % count == 0 and n // count % 2 == 0:
            return count
    raise QuantizationError(
        f"quantization: {n} weights are not cut into equal even groups of {MIN_GROUP} to {group}; choose int8"
    )


def pack(values: Any, dimension: int) -> Any:
    """Packs integers from -8 to 7 (int8), two per byte (uint8), along a dimension of even size."""
    d, shape = dimension % values.ndim, values.shape
    pairs = values.reshape(*shape[:d], shape[d] // 2, 2, *shape[d + 1 :]).astype(np.uint8)
    leading = (slice(None),) * (d + 1)
    return (pairs[(*leading, 0)] & 15) | (pairs[(*leading, 1)] << 4)


def unpack(packed: Any, dimension: int) -> Any:
    """Inverts :func:`pack`."""
    d, shape = dimension % packed.ndim, packed.shape
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    return xp.stack(halves(packed), axis=d + 1).reshape(*shape[:d], 2 * shape[d], *shape[d + 1 :])


def halves(packed: Any) -> tuple[Any, Any]:
    """Returns the low four bits of each byte and the high four bits, as int8."""
    return (packed << 4).astype(np.int8) >> 4, packed.astype(np.int8) >> 4


def scaled(values: Any, scale: Any, dimension: int, dtype: DTypeLike) -> Any:
    """Returns values times the scales of their groups along a dimension: in float32, rounded once to a dtype."""
    d, shape = dimension % values.ndim, values.shape
    num_groups = scale.shape[d]
    values = values.reshape(*shape[:d], num_groups, shape[d] // num_groups, *shape[d + 1 :]).astype(np.float32)
    scale = scale.astype(np.float32).reshape(*scale.shape[: d + 1], 1, *scale.shape[d + 1 :])
    return (values * scale).reshape(shape).astype(dtype)
