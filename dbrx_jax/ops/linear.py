"""Matmul of activations with a plain or quantised weight, in the form that is fastest on the platform.

A TPU or GPU runs one dot, and XLA fuses the weight's cast or scaling into it. A CPU has four forms (docs/cpu.md).
Few rows take sums (small_batch_matmul.py). Up to 64 rows take the transpose of w x^T for a plain weight (M, C), because
XLA copies the right operand to another layout in every call, and x is smaller than w. A quantised weight is
dequantised and multiplied block by block. All else is a dot with the weight on the right.
"""

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
BLOCK = 1 << 20  # elements of a quantised weight that a CPU dequantises at a time: they fit its caches
MIN_ROWS = 2  # with fewer, XLA's dot for CPUs first casts the whole weight to float32
MAX_ROWS_WEIGHT_LEFT = 64  # with more rows, a plain weight on the left is no faster
STRIP = 16  # rows of w x^T that are transposed together


def linear(
    x: Float[Array, "N C"], weight: Weight, contracted: int, platform: str, dtype: DTypeLike | None = None
) -> Float[Array, "N M"]:
    """Computes x w^T for a weight (M, C), or x w for (C, M), summed in float32 and rounded once.

    Args:
      contracted: the weight's dimension that is summed over: 1 for (M, C), 0 for (C, M).
      dtype: of the result; x's by default.
    """
    dtype = x.dtype if dtype is None else dtype
    if platform != "cpu":
        return _accelerator_linear(x, weight, contracted, dtype)
    rows = x.shape[0]
    if (y := small_batch_matmul(x, weight, contracted)) is not None:
        return y.astype(dtype)
    if contracted == 1 and _is_left_operand(weight, x):
        return _transpose(_dot(weight, x, 1).astype(dtype))
    is_float32 = weight.dtype == jnp.float32 and not isinstance(weight, QuantizedArray)
    if not is_float32 and rows < MIN_ROWS:
        x = jnp.concatenate([x] * MIN_ROWS)
    y = _blockwise_dot(x, weight, contracted) if isinstance(weight, QuantizedArray) else _dot(x, weight, contracted)
    return y[:rows].astype(dtype)


def gated(
    x: Float[Array, "N C"], gate: Weight, up: Weight, activation: Callable[[Array], Array], platform: str
) -> Float[Array, "N M"]:
    """Computes activation(x gate^T) * (x up^T) for weights (M, C)."""
    if platform == "cpu" and _is_left_operand(gate, x) and _is_left_operand(up, x):  # one transpose for both
        return _transpose(activation(_dot(gate, x, 1).astype(x.dtype)) * _dot(up, x, 1).astype(x.dtype))
    return activation(linear(x, gate, 1, platform)) * linear(x, up, 1, platform)


def matrix(weight: Weight, rows: int) -> Weight:
    """Reshapes a weight to two dimensions: its first `rows` dimensions, and the others, which are summed over."""
    if isinstance(weight, QuantizedArray):
        values, scale = (a.reshape(math.prod(a.shape[:rows]), -1) for a in (weight.values, weight.scale))
        return dataclasses.replace(weight, values=values, scale=scale, contracted=(-1,))
    return weight.reshape(math.prod(weight.shape[:rows]), -1)


def dequantized(weight: Weight) -> Array:
    """Returns the weight as an array of floats."""
    return weight.dequantize() if isinstance(weight, QuantizedArray) else weight


def _is_left_operand(weight: Weight, x: Array) -> TypeGuard[Array]:
    """Returns whether x w^T is computed as (w x^T)^T; never if dequantising takes longer than the copy it saves."""
    suits = MAX_ROWS < x.shape[0] <= MAX_ROWS_WEIGHT_LEFT and weight.shape[0] % STRIP == 0
    return suits and not isinstance(weight, QuantizedArray)


def _transpose(y: Array) -> Array:
    """Returns y^T, transposed in two steps by strips: in one, XLA would swap the operands of the dot that gives y."""
    strips = y.reshape(-1, STRIP, y.shape[1]).transpose(0, 2, 1)
    strips = lax.optimization_barrier(strips).transpose(1, 0, 2)
    return strips.reshape(y.shape[1], -1)


def _accelerator_linear(x: Array, weight: Weight, contracted: int, dtype: DTypeLike) -> Array:
    """Computes :func:`linear` as one dot; scales per channel multiply its result, scales of groups the weight."""
    wide = jnp.float32 if dtype == jnp.float32 else None
    if not isinstance(weight, QuantizedArray):
        return _dot(x, weight, contracted, wide)
    if weight.group is None:
        y = _dot(x, weight.integers().astype(x.dtype), contracted)
        return (y * weight.scale.reshape(1, -1).astype(jnp.float32)).astype(dtype)
    return _dot(x, weight.dequantize(x.dtype), contracted, wide)


def _dot(x: Array, weight: Array, contracted: int, dtype: DTypeLike | None = jnp.float32) -> Array:
    """Computes x w^T (1) or x w (0) without a transpose, which XLA for CPUs would do in memory."""
    return lax.dot_general(x, weight, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype)


def _blockwise_dot(x: Array, weight: QuantizedArray, contracted: int) -> Array:
    """Dequantises and multiplies one block of the weight's rows at a time, so that it stays in the CPU's cache."""
    values, scale = weight.values, weight.scale
    count = _num_blocks(values.shape[0], scale.shape[0], weight.size)
    operands = [x[:, 0::2], x[:, 1::2]] if weight.kind == "int4" else [x]  # int4: even and odd elements

    def dot_block(i: Array | int, operands: list[Array]) -> Array:
        scales = scale if scale.shape[0] == 1 else _block(scale, i, count)
        block = dataclasses.replace(weight, values=_block(values, i, count), scale=scales)
        weights = _dequantize_block(block, contracted, x.dtype)
        terms = [_dot(a, w, contracted) for a, w in zip(operands, weights, strict=True)]
        return sum(terms[1:], start=terms[0])

    def add_block(i, y):
        if contracted == 1:
            return lax.dynamic_update_slice(y, dot_block(i, operands), (0, i * (y.shape[1] // count)))
        size = operands[0].shape[1] // count
        return y + dot_block(i, [lax.dynamic_slice(a, (0, i * size), (a.shape[0], size)) for a in operands])

    y = jnp.zeros((x.shape[0], weight.shape[1 - contracted]), jnp.float32)
    y = add_block(0, y) if count == 1 else lax.fori_loop(0, count, add_block, y)
    return y * scale.reshape(1, -1).astype(jnp.float32) if weight.group is None else y


def _dequantize_block(weight: QuantizedArray, contracted: int, dtype: DTypeLike) -> list[Array]:
    """Returns values as floats, times the scales of groups but not those per channel.

    int4 gives two arrays, its even and its odd elements, because interleaving them is slow on a CPU.
    """
    parts = halves(weight.values) if weight.kind == "int4" else (weight.values,)
    if weight.group is None:
        return [part.astype(dtype) for part in parts]
    return [scaled(part, weight.scale, contracted, dtype) for part in parts]


def _num_blocks(rows: int, scales: int, size: int) -> int:
    """Returns the least number of equal blocks of stored rows, and of rows of scales, with up to BLOCK elements."""
    least = max(1, -(-size // BLOCK))
    divisors = (n for n in range(least, rows + 1) if rows % n == 0 and (scales == 1 or scales % n == 0))
    return next(divisors, 1)


def _block(array: Array, i: Array | int, count: int) -> Array:
    rows = array.shape[0] // count
    return lax.dynamic_slice(array, (i * rows, 0), (rows, array.shape[1]))
