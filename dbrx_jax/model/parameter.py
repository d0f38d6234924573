"""The one description of a parameter: shape, logical axes and initialiser."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from dbrx_jax.sharding import Partition


class Init:
    """Makes a model's parameters: random from `key`, or with `key` None shapes without memory behind them.

    A parameter's random numbers depend on the key and on how many parameters were made before it.
    `axes` names each dimension, for sharding; on a mesh every device draws its own part.
    """

    def __init__(self, key: Array | None, dtype: DTypeLike, partition: Partition):
        self.key, self.dtype, self.made, self.partition = key, jnp.dtype(dtype), 0, partition

    def normal(self, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
        """A weight drawn from normal(0, std) in float32 and rounded."""
        self.made += 1
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        sharding = self.partition.sharding(self.partition.spec(axes))
        return nnx.Param(_drawer(shape, self.dtype, sharding)(jax.random.fold_in(self.key, self.made), std), axes=axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        sharding = self.partition.sharding(self.partition.spec(axes))
        return nnx.Param(jnp.ones(shape, self.dtype, device=sharding), axes=axes)


@functools.lru_cache(maxsize=64)
def _drawer(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None):
    def draw(key, std):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    # Not compiled on one device: compiling a program for each shape would take longer.
    return draw if sharding is None else jax.jit(draw, out_shardings=sharding)
