"""quantize: quantises weights, with the same bits from numpy and from JAX on a CPU."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dbrx_jax.errors import QuantizationError
from dbrx_jax.quantization.array import VALUE_DTYPES, QuantizedArray, abstract, pack
from dbrx_jax.quantization.formats import Format

MAX_VALUE = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # largest stored value
# A group whose largest weight is below this becomes zeros: processors differ in how they treat subnormal numbers.
_TINY = np.float32(2.0**-100)
# int4 clips: of the scale that reaches the largest weight and its multiples by these, the one of least squared error.
_CLIPS = (0.92, 0.84, 0.76, 0.68)
_STEPS = 64  # the error is summed in integers, in units of 1/64 of a scale, to be the same in numpy and JAX
_BLOCK = 1 << 18  # elements that numpy quantises at a time, in the processor's cache
_NOT_FINITE = "quantization: a weight is infinite or NaN; look at where the checkpoint comes from"


def quantize(array: Any, format: Format, contracted: tuple[int, ...], dtype: DTypeLike) -> QuantizedArray:
    """Quantises an array, symmetrically about 0; numpy and JAX give the same bits on a CPU.

    Args:
      array: floats in a numpy array (the result's arrays are numpy's too, and little more memory is used), a JAX
        array, or a tracer.
      contracted: as in :class:`QuantizedArray`.
      dtype: of the scales.

    Raises:
      QuantizationError: a value (of an array that is not traced) is infinite or NaN, or as in :func:`abstract`.
    """
    shapes = abstract(tuple(array.shape), format, contracted, dtype)
    if not isinstance(array, np.ndarray):
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            raise QuantizationError(_NOT_FINITE)
        values, scale = _quantize(array, shapes, _JaxBackend)
        return dataclasses.replace(shapes, values=values, scale=scale)
    values = np.empty(shapes.values.shape, shapes.values.dtype)
    scale = np.empty(shapes.scale.shape, shapes.scale.dtype)
    for index in _block_indices(array.shape, contracted):
        block = array[index]
        if not np.isfinite(block).all():
            raise QuantizationError(_NOT_FINITE)
        values[index], scale[index] = _quantize(block, shapes, _NumpyBackend)
    return dataclasses.replace(shapes, values=values, scale=scale)


class _NumpyBackend:
    """numpy's version of the operations that numpy and JAX name differently."""

    xp: Any = np

    @staticmethod
    def round_to(x: Any, dtype: np.dtype) -> Any:
        return x.astype(dtype).astype(np.float32)

    @staticmethod
    def bitcast(x: Any, dtype: Any) -> Any:
        return x.view(dtype)


class _JaxBackend:
    xp: Any = jnp

    @staticmethod
    def round_to(x: Any, dtype: np.dtype) -> Any:
        info = jnp.finfo(dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)  # XLA may remove a pair of casts

    bitcast = staticmethod(lax.bitcast_convert_type)


def _quantize(array: Any, shapes: QuantizedArray, backend: Any) -> tuple[Any, Any]:
    """Quantises an array, or a block of it with whole contractions, to values and scales.

    So that no step can be rounded in two ways, only scales are inverted, and squares are summed in integers.
    """
    xp, kind, ndim, shape = backend.xp, shapes.kind, array.ndim, array.shape
    d = shapes.contracted[-1] % ndim
    x = array.astype(np.float32)
    if shapes.group is None:
        axes = tuple(c % ndim for c in shapes.contracted)
    else:
        x, axes = x.reshape(*shape[:d], shape[d] // shapes.group, shapes.group, *shape[d + 1 :]), (d + 1,)
    max_abs = xp.max(xp.abs(x), axis=axes, keepdims=True)
    is_zero = max_abs < _TINY
    scale = xp.where(is_zero, np.float32(1), max_abs * np.float32(1 / MAX_VALUE[kind]))
    scale = backend.round_to(scale, shapes.dtype)
    if kind == "int4":
        scale = _least_error_scale(x, scale, axes, shapes.dtype, backend)
    scaled = xp.clip(x * (np.float32(1) / scale), -MAX_VALUE[kind], MAX_VALUE[kind])
    scaled = xp.where(is_zero, np.float32(0), scaled)
    values = _to_fp8(scaled, backend) if kind == "fp8" else xp.rint(scaled).astype(np.int8)
    values = values.reshape(shape)
    scale = scale.astype(shapes.dtype)
    if shapes.group is not None:
        scale = xp.squeeze(scale, d + 1)
    return (pack(values, d) if kind == "int4" else values), scale


def _least_error_scale(x: Any, scale: Any, axes: tuple[int, ...], dtype: np.dtype, backend: Any) -> Any:
    """Returns the int4 scale of least squared error: `scale` or its multiple by one of _CLIPS."""
    xp, max_value = backend.xp, MAX_VALUE["int4"]
    inverse_scale = np.float32(1) / scale
    x_steps = xp.rint(x * inverse_scale * np.float32(_STEPS)).astype(np.int32)
    best_scale = least_error = None
    for clip in (1.0, *_CLIPS):
        candidate = backend.round_to(scale * np.float32(clip), dtype)
        values = xp.rint(xp.clip(x * (np.float32(1) / candidate), -max_value, max_value)).astype(np.int32)
        error = x_steps - values * xp.rint(candidate * inverse_scale * np.float32(_STEPS)).astype(np.int32)
        error = xp.sum(error * error, axis=axes, keepdims=True, dtype=np.int32)
        if least_error is None:
            best_scale, least_error = candidate, error
        else:
            best_scale = xp.where(error < least_error, candidate, best_scale)
            least_error = xp.minimum(error, least_error)
    return best_scale


def _to_fp8(x: Any, backend: Any) -> Any:
    """Rounds to float8_e4m3fn, to nearest even: some casts round twice. Never returns -0, which XLA does not keep."""
    bits = backend.bitcast(x, np.uint32)
    bits = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) & np.uint32(0xFFF00000)  # three bits of mantissa
    normal = backend.bitcast(bits, np.float32)
    subnormal = backend.xp.rint(x * np.float32(512)) * np.float32(1 / 512)
    rounded = backend.xp.where(backend.xp.abs(x) < np.float32(1 / 64), subnormal, normal)
    return backend.xp.where(rounded == 0, np.float32(0), rounded).astype(VALUE_DTYPES["fp8"])


def _block_indices(shape: tuple[int, ...], contracted: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yields indices of blocks of about _BLOCK elements along the first dimension that is not contracted."""
    d = next(i for i in range(len(shape)) if i - len(shape) not in contracted)
    step = max(1, _BLOCK * shape[d] // max(1, math.prod(shape)))
    for start in range(0, shape[d], step):
        yield (*[slice(None)] * d, slice(start, min(start + step, shape[d])))
