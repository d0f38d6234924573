"""The one description of a parameter: shape, logical axes and initialiser."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class Init:
    """Makes a model's parameters: random from `key`, or with `key` None shapes without memory behind them.

    A parameter's random numbers depend on the key and on how many parameters were made before it.
    `axes` names each dimension, for sharding.
    """

    def __init__(self, key: Array | None, dtype: DTypeLike):
        self.key, self.dtype, self.made = key, jnp.dtype(dtype), 0

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
        """A weight drawn from normal(0, std) in float32 and rounded."""
        self.made += 1
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        draw = std * jax.random.normal(jax.random.fold_in(self.key, self.made), shape, jnp.float32)
        return nnx.Param(draw.astype(self.dtype), axes=axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        return nnx.Param(jnp.ones(shape, self.dtype), axes=axes)
