"""Products of rows with a weight, plain or quantised, in the arrangement that suits the platform."""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeGuard

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from dbrx_jax.ops.small_batch_matmul import MAX_ROWS, small_batch_matmul
from dbrx_jax.quantization import QuantizedArray
from dbrx_jax.quantization.array import halves, scaled

Weight = Array | QuantizedArray
# Elements of a quantised weight that a CPU dequantises at a time: what fits its caches.
BLOCK = 1 << 20
# Fewer rows than these take a path of XLA's for CPUs that first casts the whole weight to float32.
MIN_ROWS = 2
# From more rows on than are summed, and up to these, a CPU is faster with the weight on the left, which XLA reads as
# it lies; what is on the right it lays out anew in every call.
MAX_ROWS_BESIDE = 64
# Rows that are transposed by themselves.
STRIP = 16


def linear(
    x: Float[Array, "N C"], weight: Weight, contracted: int, platform: str, dtype: DTypeLike | None = None
) -> Float[Array, "N M"]:
    """x w^T for a weight (M, C), or x w for (C, M), summed in float32 and rounded once.

    Args:
      weight: of two dimensions; on a CPU a quantised one is dequantised in blocks, never as a whole.
      contracted: its dimension that is summed over, 1 or 0.
      platform: of the devices.
      dtype: of the result; x's by default.
    """
    dtype = x.dtype if dtype is None else dtype
    if platform != "cpu":
        return _elsewhere(x, weight, contracted, dtype)
    rows = x.shape[0]
    if (result := small_batch_matmul(x, weight, contracted)) is not None:
        return result.astype(dtype)
    if contracted == 1 and _goes_left(weight, x):
        return _transposed(_product(weight, x, 1).astype(dtype))
    plain = weight.dtype == jnp.float32 and not isinstance(weight, QuantizedArray)
    if not plain and rows < MIN_ROWS:
        x = jnp.concatenate([x] * MIN_ROWS)
    y = _in_blocks(x, weight, contracted) if isinstance(weight, QuantizedArray) else _product(x, weight, contracted)
    return y[:rows].astype(dtype)


def gated(
    x: Float[Array, "N C"], gate: Weight, up: Weight, activation: Callable[[Array], Array], platform: str
) -> Float[Array, "N M"]:
    """activation(x gate^T) * (x up^T) with weights (M, C), transposed but once where they are on the left."""
    if platform == "cpu" and _goes_left(gate, x) and _goes_left(up, x):
        return _transposed(activation(_product(gate, x, 1).astype(x.dtype)) * _product(up, x, 1).astype(x.dtype))
    return activation(linear(x, gate, 1, platform)) * linear(x, up, 1, platform)


def matrix(weight: Weight, rows: int) -> Weight:
    """A weight in two dimensions: its first `rows` dimensions as one, and the others, which are summed over."""
    if isinstance(weight, QuantizedArray):
        values, scale = (a.reshape(math.prod(a.shape[:rows]), -1) for a in (weight.values, weight.scale))
        return dataclasses.replace(weight, values=values, scale=scale, contracted=(-1,))
    return weight.reshape(math.prod(weight.shape[:rows]), -1)


def dequantized(weight: Weight) -> Array:
    """The weight as an array of floats."""
    return weight.dequantize() if isinstance(weight, QuantizedArray) else weight


def _goes_left(weight: Weight, x: Array) -> TypeGuard[Array]:
    """Quantised weights stay on the right: dequantising them takes longer than copying their layout."""
    fits = MAX_ROWS < x.shape[0] <= MAX_ROWS_BESIDE and weight.shape[0] % STRIP == 0
    return fits and not isinstance(weight, QuantizedArray)


def _transposed(y: Array) -> Array:
    """y^T in two steps, by strips: in one, XLA would swap the sides of the product that gives y."""
    strips = y.reshape(-1, STRIP, y.shape[1]).transpose(0, 2, 1)
    strips = lax.optimization_barrier(strips).transpose(1, 0, 2)
    return strips.reshape(y.shape[1], -1)


def _elsewhere(x: Array, weight: Weight, contracted: int, dtype: DTypeLike) -> Array:
    """The compilers of TPU and GPU read a cast or scaled weight inside the product, where it has a scale a channel."""
    wide = jnp.float32 if dtype == jnp.float32 else None
    if not isinstance(weight, QuantizedArray):
        return _product(x, weight, contracted, wide)
    if weight.group is None:
        y = _product(x, weight.integers().astype(x.dtype), contracted)
        return (y * weight.scale.reshape(1, -1).astype(jnp.float32)).astype(dtype)
    return _product(x, weight.dequantize(x.dtype), contracted, wide)


def _product(x: Array, weight: Array, contracted: int, dtype: DTypeLike | None = jnp.float32) -> Array:
    """x w^T (1) or x w (0). Written without transposing: XLA for CPUs would do that in memory."""
    return lax.dot_general(x, weight, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype)


def _in_blocks(x: Array, weight: QuantizedArray, contracted: int) -> Array:
    """Dequantises and multiplies blocks of the weight's rows, each within the processor's cache."""
    values, scale = weight.values, weight.scale
    count = _blocks(values.shape[0], scale.shape[0], weight.size)
    rows = [x[:, 0::2], x[:, 1::2]] if weight.kind == "int4" else [x]

    def product(i: Array | int, rows: list[Array]) -> Array:
        scales = scale if scale.shape[0] == 1 else _part(scale, i, count)
        part = dataclasses.replace(weight, values=_part(values, i, count), scale=scales)
        terms = [_product(r, w, contracted) for r, w in zip(rows, _floats(part, contracted, x.dtype), strict=True)]
        return sum(terms[1:], start=terms[0])

    def add(i, y):
        if contracted == 1:
            return lax.dynamic_update_slice(y, product(i, rows), (0, i * (y.shape[1] // count)))
        size = rows[0].shape[1] // count
        return y + product(i, [lax.dynamic_slice(r, (0, i * size), (r.shape[0], size)) for r in rows])

    y = jnp.zeros((x.shape[0], weight.shape[1 - contracted]), jnp.float32)
    y = add(0, y) if count == 1 else lax.fori_loop(0, count, add, y)
    return y * scale.reshape(1, -1).astype(jnp.float32) if weight.group is None else y


def _floats(weight: QuantizedArray, contracted: int, dtype: DTypeLike) -> list[Array]:
    """The weight as floats, without scales per channel; of two values in a byte the even ones and the odd ones.

    These stay apart: a CPU takes long to put them in order.
    """
    parts = halves(weight.values) if weight.kind == "int4" else (weight.values,)
    if weight.group is None:
        return [part.astype(dtype) for part in parts]
    return [scaled(part, weight.scale, contracted, dtype) for part in parts]


def _blocks(rows: int, scales: int, size: int) -> int:
    """The fewest equal blocks of rows (as stored), and of scales where each has its own, of up to BLOCK elements."""
    least = max(1, -(-size // BLOCK))
    fits = (n for n in range(least, rows + 1) if rows % n == 0 and (scales == 1 or scales % n == 0))
    return next(fits, 1)


def _part(array: Array, i: Array | int, count: int) -> Array:
    rows = array.shape[0] // count
    return lax.dynamic_slice(array, (i * rows, 0), (rows, array.shape[1]))
