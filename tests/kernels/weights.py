"""Random weights for the tests of kernels, drawn as they are stored: to quantise them takes a compiler each time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import Format, QuantizedArray
from dbrx_jax.quantization.array import abstract

# Compilers' options: what the tests run is little, and compiled once.
QUICKLY = {"xla_backend_optimization_level": 0}
# About what a stored value is.
SIZES = {"int8": 64, "fp8": 1, "int4": 4}


def shape_of(shape, form, contracted, dtype=jnp.bfloat16):
    """Shapes of weights (E, ., .) in a format, or "plain", whose last dimension is contracted (1) or not (0)."""
    if form == "plain":
        return jax.ShapeDtypeStruct(shape, dtype)
    return abstract(shape, Format.parse(form), (-1,) if contracted else (-2,), dtype)


def weight_of(shape, form, contracted, dtype=jnp.bfloat16, seed=0):
    """Such weights, which keep the size of what they are multiplied by."""
    random, size = np.random.default_rng(seed), shape[1 + contracted] ** -0.5
    if form == "plain":
        return jnp.asarray(random.standard_normal(shape) * size, dtype)
    weight = shape_of(shape, form, contracted, dtype)
    scale = random.uniform(0.5, 1.5, weight.scale.shape) * size / SIZES[weight.kind]
    values = _values(random, weight.values, weight.kind)
    return dataclasses.replace(weight, values=jnp.asarray(values), scale=jnp.asarray(scale.astype(dtype)))


def _values(random, values, kind):
    if kind == "fp8":
        return random.standard_normal(values.shape).astype(values.dtype)
    if kind == "int8":
        return random.integers(-127, 128, values.shape, np.int8)
    low, high = random.integers(-7, 8, (2, *values.shape))
    return (low & 15 | (high & 15) << 4).astype(np.uint8)


def stored_bytes(weight):
    """Bytes of values and scales, for a weight or its shape."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(weight))


_dequantized = jax.jit(lambda weight: weight.dequantize(jnp.float32))


def floats(array: Weight) -> np.ndarray:
    """In float32."""
    return np.asarray(_dequantized(array) if isinstance(array, QuantizedArray) else array, np.float32)
