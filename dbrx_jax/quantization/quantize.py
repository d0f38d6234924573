"""Quantising weights, with the same bits from numpy and from JAX on a CPU."""

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

MAX_VALUE = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # value stored
# A group whose largest weight is below this is zeros: processors treat subnormal numbers each in its own way.
_TINY = np.float32(2.0**-100)
# int4 takes the scale, among these times the one that reaches the largest weight, whose squared error is least.
_CLIPS = (0.92, 0.84, 0.76, 0.68)
_STEPS = 64  # that error is summed in whole numbers, of steps so much finer: the same on numpy and on JAX
_BLOCK = 1 << 18  # elements that numpy works on at a time, in the processor's cache


def quantize(array: Any, format: Format, contracted: tuple[int, ...], dtype: DTypeLike) -> QuantizedArray:
    """An array in a format, symmetric about 0; numpy and JAX give the same bits on a CPU.

    Args:
      array: floats, of numpy (then numpy's arrays are the result, and little more memory is used), JAX's, or
        traced.
      contracted: as in :class:`QuantizedArray`.
      dtype: of the scales.

    Raises:
      QuantizationError: a value (of an array that is not traced) is infinite or NaN, or as in :func:`abstract`.
    """
    shapes = abstract(tuple(array.shape), format, contracted, dtype)
    if not isinstance(array, np.ndarray):
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            raise _not_finite()
        values, scale = _quantize(array, shapes, _Jax)
        return dataclasses.replace(shapes, values=values, scale=scale)
    values = np.empty(shapes.values.shape, shapes.values.dtype)
    scale = np.empty(shapes.scale.shape, shapes.scale.dtype)
    for part in _parts(array.shape, contracted):
        block = array[part]
        if not np.isfinite(block).all():
            raise _not_finite()
        values[part], scale[part] = _quantize(block, shapes, _Numpy)
    return dataclasses.replace(shapes, values=values, scale=scale)


class _Numpy:
    """Operations that numpy and JAX spell differently, for numpy."""

    xp: Any = np

    @staticmethod
    def round_to(x: Any, dtype: np.dtype) -> Any:
        return x.astype(dtype).astype(np.float32)

    @staticmethod
    def bits(x: Any, dtype: Any) -> Any:
        return x.view(dtype)


class _Jax:
    xp: Any = jnp

    @staticmethod
    def round_to(x: Any, dtype: np.dtype) -> Any:
        # XLA may leave out a cast there and back.
        info = jnp.finfo(dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)

    @staticmethod
    def bits(x: Any, dtype: Any) -> Any:
        return lax.bitcast_convert_type(x, dtype)


def _quantize(array: Any, like: QuantizedArray, on: Any) -> tuple[Any, Any]:
    """Quantises an array, or a part of it with whole contractions, to values and scales.

    No step leaves room for two roundings: reciprocals are taken of scales alone, squares summed in whole numbers.
    """
    xp, kind, ndim = on.xp, like.kind, array.ndim
    d = like.contracted[-1] % ndim
    shape = array.shape
    x = array.astype(np.float32)
    if like.group is None:
        over = tuple(c % ndim for c in like.contracted)
    else:
        x, over = x.reshape(*shape[:d], shape[d] // like.group, like.group, *shape[d + 1 :]), (d + 1,)
    largest = xp.max(xp.abs(x), axis=over, keepdims=True)
    zero = largest < _TINY
    scale = on.round_to(xp.where(zero, np.float32(1), largest * np.float32(1 / MAX_VALUE[kind])), like.dtype)
    if kind == "int4":
        scale = _least_error(x, scale, over, like.dtype, on)
    scaled = xp.clip(x * (np.float32(1) / scale), -MAX_VALUE[kind], MAX_VALUE[kind])
    scaled = xp.where(zero, np.float32(0), scaled)
    values = _to_fp8(scaled, on) if kind == "fp8" else xp.rint(scaled).astype(np.int8)
    values = values.reshape(shape)
    scale = scale.astype(like.dtype)
    if like.group is not None:
        scale = xp.squeeze(scale, d + 1)
    return (pack(values, d) if kind == "int4" else values), scale


def _least_error(x: Any, scale: Any, over: tuple[int, ...], dtype: np.dtype, on: Any) -> Any:
    """The scale, among some smaller ones, with the least squared error."""
    xp, top = on.xp, MAX_VALUE["int4"]
    unit = np.float32(1) / scale
    fine = xp.rint(x * unit * np.float32(_STEPS)).astype(np.int32)
    best = least = None
    for clip in (1.0, *_CLIPS):
        tried = on.round_to(scale * np.float32(clip), dtype)
        values = xp.rint(xp.clip(x * (np.float32(1) / tried), -top, top)).astype(np.int32)
        error = fine - values * xp.rint(tried * unit * np.float32(_STEPS)).astype(np.int32)
        error = xp.sum(error * error, axis=over, keepdims=True, dtype=np.int32)
        if least is None:
            best, least = tried, error
        else:
            best, least = xp.where(error < least, tried, best), xp.minimum(error, least)
    return best


def _to_fp8(x: Any, on: Any) -> Any:
    """Rounds to float8_e4m3fn, to nearest even: some casts round twice. Gives no -0, which XLA does not keep."""
    bits = on.bits(x, np.uint32)
    bits = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) & np.uint32(0xFFF00000)  # three bits of mantissa
    normal = on.bits(bits, np.float32)
    subnormal = on.xp.rint(x * np.float32(512)) * np.float32(1 / 512)
    rounded = on.xp.where(on.xp.abs(x) < np.float32(1 / 64), subnormal, normal)
    return on.xp.where(rounded == 0, np.float32(0), rounded).astype(VALUE_DTYPES["fp8"])


def _parts(shape: tuple[int, ...], contracted: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array, whole along its contraction, of about _BLOCK elements."""
    d = next(i for i in range(len(shape)) if i - len(shape) not in contracted)
    step = max(1, _BLOCK * shape[d] // max(1, math.prod(shape)))
    for start in range(0, shape[d], step):
        yield (*[slice(None)] * d, slice(start, min(start + step, shape[d])))


def _not_finite() -> QuantizationError:
    return QuantizationError("quantization: a weight is infinite or NaN; look at where the checkpoint comes from")
