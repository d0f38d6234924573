"""Parameters of the model: shape, logical axes, initialiser and quantisation of each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from dbrx_jax.quantization import Format, Quantization, quantize
from dbrx_jax.quantization.array import abstract
from dbrx_jax.sharding.partition import Partition


class Init:
    """Creates a model's parameters: random from `key`, or with `key` None shapes without memory.

    A parameter's random numbers depend on the key and on the number of parameters created before it.
    `axes` names each dimension, for sharding; on a mesh every device draws its shard.
    """

    def __init__(
        self, key: Array | None, dtype: DTypeLike, partition: Partition, quantization: Quantization | None = None
    ):
        self.key, self.dtype, self.partition, self.quantization = key, jnp.dtype(dtype), partition, quantization
        self.num_created = 0

    def normal(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        std: float,
        part: str | None = None,
        contracted: tuple[int, ...] = (-1,),
    ) -> nnx.Param:
        """Creates a weight, drawn from normal(0, std) in float32 and cast or quantised.

        Args:
          part: the field of a :class:`Quantization` with its format; None is never quantised.
          contracted: its dimensions that are summed over, as in :class:`QuantizedArray`.

        Raises:
          QuantizationError, MeshError: it cannot be quantised in that format, or not on this mesh.
        """
        self.num_created += 1
        format = None if part is None or self.quantization is None else getattr(self.quantization, part)
        value: Any = jax.ShapeDtypeStruct(shape, self.dtype)
        if format is not None:
            value = abstract(shape, format, contracted, self.dtype)
        specs = self.partition.specs_of(value, axes)
        if self.key is not None:
            shardings, tree = jax.tree.flatten(jax.tree.map(self.partition.sharding, specs))
            sample = _sampler(shape, self.dtype, format, contracted, tuple(shardings), tree)
            value = sample(jax.random.fold_in(self.key, self.num_created), std)
        return nnx.Param(value, axes=axes, part=part, contracted=contracted)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        sharding = self.partition.sharding(self.partition.spec(axes))
        return nnx.Param(jnp.ones(shape, self.dtype, device=sharding), axes=axes)


@functools.lru_cache(maxsize=64)
def _sampler(shape, dtype: jnp.dtype, format: Format | None, contracted: tuple[int, ...], shardings: tuple, tree):
    """Returns a function that draws a parameter from a random key and a standard deviation."""

    def sample(key, std):
        weight = std * jax.random.normal(key, shape, jnp.float32)
        return weight.astype(dtype) if format is None else quantize(weight, format, contracted, dtype)

    # Not compiled on one device: compiling a program for each shape would take longer.
    return jax.jit(sample, out_shardings=jax.tree.unflatten(tree, shardings)) if shardings else sample
