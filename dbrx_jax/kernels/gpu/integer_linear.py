"""Matmuls of few rows with int8 or int4 weights on Hopper GPUs, by integer products (integer_products.py)."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dbrx_jax.kernels.gpu.fixed_point import MIN_ROWS
from dbrx_jax.kernels.gpu.fixed_point_rows import fixed_point_rows
from dbrx_jax.kernels.gpu.integer_products import IntegerTiles, multiply
from dbrx_jax.kernels.gpu.integer_weights import CHANNELS, IntegerWeights, fits, pack
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

MAX_ROWS = 64
_BLOCKS = 384  # thread blocks at least: about three for each of a card's 132 multiprocessors
_STEPS = 4


def supports(x: Any, *weights: Weight) -> bool:
    """Returns whether :func:`integer_linear` supports these shapes and dtypes (arrays or shapes)."""
    stacked = [_stacked(w) for w in weights if isinstance(w, QuantizedArray)]
    if len(stacked) < len(weights) or x.dtype != jnp.bfloat16:
        return False
    alike = len({(w.kind, w.group, w.values.shape[2]) for w in stacked}) == 1
    return alike and x.shape[0] <= MAX_ROWS and all(fits(w, 1) for w in stacked)


def integer_linear(x: Float[Array, "N C"], *weights: QuantizedArray, interpret: Any = None) -> list[Array]:
    """Multiplies rows by each weight, contracted last: float32 arrays (N, M), with one kernel.

    Args:
      weights: (..., C), or (M, ..., K) with C elements behind the first; of one kind.
    """
    packed = [pack(_stacked(w), 1) for w in weights]
    num_rows = x.shape[0]
    one, item, size = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32), num_rows + -num_rows % MIN_ROWS
    rows = fixed_point_rows(lambda row: row, [x[None, None]], size, None, packed[0], interpret)
    results = multiply(
        rows, [(w,) for w in packed], item, one, default_tiles(packed), interpret=interpret, name="integer_linear"
    )
    return [jnp.sum(y[0, :, :num_rows], axis=0) for y in results]


def default_tiles(weights: list[IntegerWeights]) -> IntegerTiles:
    """Returns tile sizes with enough thread blocks to keep every multiprocessor busy."""
    depth = next(d for d in (128, 64) if weights[0].depth % d == 0)
    num_steps, tiles = weights[0].depth // depth, sum(w.channels for w in weights) // CHANNELS
    valid = [s for s in range(1, num_steps + 1) if num_steps % s == 0 and (s == 1 or num_steps // s >= 3)]
    if weights[0].group is not None:  # the scales of a split are copied in multiples of 16 bytes
        groups = weights[0].group_scales.shape[2]
        valid = [s for s in valid if groups % (8 * s) == 0]
    splits = next((s for s in valid if s * tiles >= _BLOCKS), valid[-1])
    return IntegerTiles(depth, min(_STEPS, num_steps // splits), splits)


def _stacked(weight: QuantizedArray) -> QuantizedArray:
    """Returns a weight as a stack of one matrix (1, M, C)."""
    contracted = math.prod(weight.shape[d] for d in weight.contracted)
    values = weight.values.reshape(1, -1, contracted // (2 if weight.kind == "int4" else 1))
    return QuantizedArray(values, weight.scale.reshape(1, values.shape[1], -1), weight.kind, (-1,), weight.group)
