"""QuantizedArray: an array stored as small numbers and scales."""

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
    "int4": np.dtype(np.uint8),  # two in a byte
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array as small numbers and scales: numpy arrays, JAX arrays, shapes of them, or places on a mesh.

    Args:
      values: int8, or float8_e4m3fn (fp8), of the array's shape. int4: uint8, in which element 2k along the
        last contracted dimension has the low four bits and 2k + 1 the high, in two's complement from -7 to
        7, so that dimension is halved.
      scale: of the activations' dtype and the values' rank. Per channel: 1 in contracted dimensions; in
        groups: their number in the last contracted dimension, and the array's size in others.
      kind: see :class:`Format`.
      contracted: the dimensions that a matrix product sums over, counted from the end, ascending.
      group: how many weights along the last contracted dimension have one scale; None is per channel.
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
        """Part of the first dimension, or rows by an array of their numbers; that dimension is not contracted."""
        if index is Ellipsis:
            return self
        if isinstance(index, tuple) or -self.ndim in self.contracted:
            raise IndexError("only the first dimension can be indexed, where nothing is summed over it")
        return dataclasses.replace(self, values=self.values[index], scale=self.scale[index])

    def scale_splits(self, dimension: int) -> bool:
        """Returns whether the scale of a shard is split together with the values along a dimension."""
        d = dimension % self.ndim - self.ndim
        if d not in self.contracted:
            return True
        return self.group is not None and (d != self.contracted[-1] or self.group <= self.shape[d])

    def integers(self) -> Any:
        """The values without their scales in the array's shape, int4 unpacked to int8."""
        return unpack(self.values, self.contracted[-1]) if self.kind == "int4" else self.values

    def dequantize(self, dtype: DTypeLike | None = None) -> Any:
        """The array: products in float32, rounded once to a dtype (the scales' by default)."""
        dtype = self.scale.dtype if dtype is None else dtype
        return scaled(self.integers(), self.scale, self.contracted[-1], dtype)


def abstract(shape: tuple[int, ...], format: Format, contracted: tuple[int, ...], dtype: DTypeLike) -> QuantizedArray:
    """The result of quantising an array of this shape, as shapes without memory behind them.

    Raises:
      QuantizationError: the contraction is not cut into equal groups of that size, or the dtype has no scales.
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
        for each in contracted:
            scale[each] = 1
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
    """Into how many groups a contraction of n is cut: the fewest equal ones, of an even number up to `group`.

    Raises:
      QuantizationError: they would have less than MIN_GROUP.
    """
    for count in range(-(-n // group), n // MIN_GROUP + 1):
        if n % count == 0 and n // count % 2 == 0:
            return count
    raise QuantizationError(
        f"quantization: {n} weights are not cut into equal even groups of {MIN_GROUP} to {group}; choose int8"
    )


def pack(values: Any, dimension: int) -> Any:
    """Numbers from -8 to 7 (int8), two in a byte (uint8) along a dimension of even size."""
    low, high = _pairs(values, dimension)
    return (low.astype(np.uint8) & 15) | (high.astype(np.uint8) << 4)


def unpack(packed: Any, dimension: int) -> Any:
    """The inverse of :func:`pack`."""
    d = dimension % packed.ndim
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    shape = packed.shape
    return xp.stack(halves(packed), axis=d + 1).reshape(*shape[:d], 2 * shape[d], *shape[d + 1 :])


def halves(packed: Any) -> tuple[Any, Any]:
    """The even and the odd ones of values that are two in a byte (uint8), as int8."""
    return (packed << 4).astype(np.int8) >> 4, packed.astype(np.int8) >> 4


def scaled(values: Any, scale: Any, dimension: int, dtype: DTypeLike) -> Any:
    """Small numbers times the scales of their groups along a dimension: in float32, rounded once to a dtype."""
    d = dimension % values.ndim
    shape, groups = values.shape, scale.shape[d]
    values = values.reshape(*shape[:d], groups, shape[d] // groups, *shape[d + 1 :]).astype(np.float32)
    scale = scale.astype(np.float32).reshape(*scale.shape[: d + 1], 1, *scale.shape[d + 1 :])
    return (values * scale).reshape(shape).astype(dtype)


def _pairs(values: Any, dimension: int) -> tuple[Any, Any]:
    d, shape = dimension % values.ndim, values.shape
    pairs = values.reshape(*shape[:d], shape[d] // 2, 2, *shape[d + 1 :])
    before = (slice(None),) * (d + 1)
    return pairs[(*before, 0)], pairs[(*before, 1)]
