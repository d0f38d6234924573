"""Random weights for kernel tests, generated in stored form because compiling a quantisation takes long."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import Format, QuantizedArray
from dbrx_jax.quantization.array import abstract

# Compiler options: each program runs once on small arrays, so fast compilation matters most.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
# Typical magnitude of a stored value.
TYPICAL_VALUE = {"int8": 64, "fp8": 1, "int4": 4}


def shape_of(shape, fmt, contracted, dtype=jnp.bfloat16):
    """Returns the shape of weights (E, ., .), quantised or "plain"; the last dimension is contracted (1) or not (0)."""
    if fmt == "plain":
        return jax.ShapeDtypeStruct(shape, dtype)
    return abstract(shape, Format.parse(fmt), (-1,) if contracted else (-2,), dtype)


def weight_of(shape, fmt, contracted, dtype=jnp.bfloat16, seed=0):
    """Returns random weights of this shape, scaled so that products keep the magnitude of the activations."""
    random, size = np.random.default_rng(seed), shape[1 + contracted] ** -0.5
    if fmt == "plain":
        return jnp.asarray(random.standard_normal(shape) * size, dtype)
    weight = shape_of(shape, fmt, contracted, dtype)
    scale = random.uniform(0.5, 1.5, weight.scale.shape) * size / TYPICAL_VALUE[weight.kind]
    values = _random_values(random, weight.values, weight.kind)
    return dataclasses.replace(weight, values=jnp.asarray(values), scale=jnp.asarray(scale.astype(dtype)))


def _random_values(random, values, kind):
    if kind == "fp8":
        return random.standard_normal(values.shape).astype(values.dtype)
    if kind == "int8":
        return random.integers(-127, 128, values.shape, np.int8)
    low, high = random.integers(-7, 8, (2, *values.shape))
    return (low & 15 | (high & 15) << 4).astype(np.uint8)


def stored_bytes(weight):
    """Returns the bytes of values and scales of a weight or its shape."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(weight))


_dequantized = jax.jit(lambda weight: weight.dequantize(jnp.float32))


def to_float32(array: Weight) -> np.ndarray:
    """Returns the array in float32, dequantised."""
    return np.asarray(_dequantized(array) if isinstance(array, QuantizedArray) else array, np.float32)
