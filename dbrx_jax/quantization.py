"""Weight-only quantisation: small numbers and their scales, in one type of array through the whole project.

A weight is an integer (or an 8-bit float) times a scale. int8 and fp8 have a scale for each output
channel, that is for all weights that one sum of the matrix product runs over; int4 has one for each
group of them. Qwix's QArray is not used because it does not pack int4: jnp.int4 takes a byte on the
disk, and in memory with jax 0.10.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dbrx_jax.errors import QuantizationError

Kind = Literal["int8", "int4", "fp8"]
GROUPS = (32, 64, 128)  # that can be asked for
FORMATS = ("int8", "fp8", "int4", *(f"int4-{g}" for g in GROUPS))
PRESETS = ("int8", "int4", *(f"int4-{g}" for g in GROUPS), "fp8")
PARTS = ("experts", "attention", "embedding", "head")
SCALE_DTYPES = ("bfloat16", "float32")
SMALLEST_GROUP = 8

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # value stored
VALUE_DTYPES = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),  # two in a byte
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
# A group whose largest weight is below this is zeros: processors treat subnormal numbers each in its own way.
_TINY = np.float32(2.0**-100)
# int4 takes the scale, among these times the one that reaches the largest weight, whose squared error is least.
_CLIPS = (0.92, 0.84, 0.76, 0.68)
_STEPS = 64  # that error is summed in whole numbers, of steps so much finer: the same on numpy and on JAX
_BLOCK = 1 << 18  # elements that numpy works on at a time, in the processor's cache


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of weight is stored.

    Args:
      kind: "int8" (-127 to 127), "int4" (-7 to 7) or "fp8" (float8_e4m3fn).
      group: of int4, the weights along the contraction that share a scale, at most; None: per output channel.
    """

    kind: Kind
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Format":
        """From a text such as "int8" or "int4-64".

        Raises:
          QuantizationError: it is not one of FORMATS.
        """
        if text not in FORMATS:
            raise QuantizationError(f"quantization: expected {_or(FORMATS)}, got {text!r:.40}")
        kind, _, group = text.partition("-")
        return cls(cast(Kind, kind), int(group) if group else None)

    def __str__(self) -> str:
        return self.kind if self.group is None else f"{self.kind}-{self.group}"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which weights of a model are quantised, and how; None leaves them in the model's dtype. Routers and norms are."""

    experts: Format | None = None
    attention: Format | None = None
    embedding: Format | None = None
    head: Format | None = None

    @classmethod
    def parse(cls, text: "str | Quantization | None") -> "Quantization | None":
        """From a text: "int8", "int4" (experts in groups of 128, the rest int8; also "int4-32", "int4-64",
        "int4-128"), "fp8" (the embedding int8), or parts such as "experts=int4-64,attention=int8", in which a
        format may be "int4" too: per output channel. What is no text comes back as it is.

        Raises:
          QuantizationError: it is none of these.
        """
        if text is None or isinstance(text, Quantization):
            return text
        int8 = Format("int8")
        if text in ("int8", "int4", "fp8"):
            return {
                "int8": cls(int8, int8, int8, int8),
                "int4": cls(Format("int4", 128), int8, int8, int8),
                "fp8": cls(Format("fp8"), Format("fp8"), int8, Format("fp8")),
            }[text]
        if text in PRESETS:
            return cls(Format.parse(text), int8, int8, int8)
        parts: dict[str, Format] = {}
        for word in str(text).split(","):
            part, _, form = (w.strip() for w in word.partition("="))
            if part not in PARTS or part in parts or form not in FORMATS:
                raise QuantizationError(
                    f'quantization: expected {_or(PRESETS)}, or parts such as "experts=int4-64,attention=int8" '
                    f"({', '.join(PARTS)}; {', '.join(FORMATS)}), got {str(text)!r:.80}"
                )
            parts[part] = Format.parse(form)
        return cls(**parts)

    def __str__(self) -> str:
        """A text that :meth:`parse` reads back."""
        for text in PRESETS:
            if self == Quantization.parse(text):
                return text
        return ",".join(f"{part}={form}" for part in PARTS if (form := getattr(self, part)) is not None)

    def format_of(self, name: str) -> Format | None:
        """Of a parameter by its dotted name."""
        part = part_of(name)
        return None if part is None else getattr(self, part)


def part_of(name: str) -> str | None:
    """Which of PARTS a parameter belongs to, by its dotted name; None for routers and norms."""
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    return {"embedding": "embedding", "lm_head": "head"}.get(name)


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
        """Of the array that it stands for."""
        shape = list(self.values.shape)
        shape[self.contracted[-1]] *= 2 if self.kind == "int4" else 1
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the array that it stands for."""
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
        """Of a part of an array on one device: whether the scale was split with the values in a dimension."""
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
    """What :func:`quantize` makes of an array of this shape, as shapes without memory behind them.

    Raises:
      QuantizationError: the contraction is not cut into equal groups of that size, or the dtype has no scales.
    """
    if np.dtype(dtype).name not in SCALE_DTYPES:
        raise QuantizationError(
            f"quantization: its weights are used in {_or(SCALE_DTYPES)}, got {np.dtype(dtype)}; choose a dtype"
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
      QuantizationError: they would have less than SMALLEST_GROUP.
    """
    for count in range(-(-n // group), n // SMALLEST_GROUP + 1):
        if n % count == 0 and n // count % 2 == 0:
            return count
    raise QuantizationError(
        f"quantization: {n} weights are not cut into equal even groups of {SMALLEST_GROUP} to {group}; choose int8"
    )


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


class _Numpy:
    """What numpy and JAX do each in its own way."""

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
    """Values and scales, of an array or of a part of it that whole contractions lie in.

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
    scale = on.round_to(xp.where(zero, np.float32(1), largest * np.float32(1 / LARGEST[kind])), like.dtype)
    if kind == "int4":
        scale = _least_error(x, scale, over, like.dtype, on)
    scaled = xp.clip(x * (np.float32(1) / scale), -LARGEST[kind], LARGEST[kind])
    scaled = xp.where(zero, np.float32(0), scaled)
    values = _to_fp8(scaled, on) if kind == "fp8" else xp.rint(scaled).astype(np.int8)
    values = values.reshape(shape)
    scale = scale.astype(like.dtype)
    if like.group is not None:
        scale = xp.squeeze(scale, d + 1)
    return (pack(values, d) if kind == "int4" else values), scale


def _least_error(x: Any, scale: Any, over: tuple[int, ...], dtype: np.dtype, on: Any) -> Any:
    """The scale, among some smaller ones, with the least squared error."""
    xp, top = on.xp, LARGEST["int4"]
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
    """float8_e4m3fn, rounded to nearest even by hand: some casts round twice. Without -0, which XLA does not keep."""
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


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
