"""The one description of a parameter: shape, logical axes, initialiser and how it can be quantised."""

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
    """Makes a model's parameters: random from `key`, or with `key` None shapes without memory behind them.

    A parameter's random numbers depend on the key and on how many parameters were made before it.
    `axes` names each dimension, for sharding; on a mesh every device draws its own part.
    """

    def __init__(
        self, key: Array | None, dtype: DTypeLike, partition: Partition, quantization: Quantization | None = None
    ):
        self.key, self.dtype, self.made, self.partition = key, jnp.dtype(dtype), 0, partition
        self.quantization = quantization

    def normal(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        std: float,
        part: str | None = None,
        contracted: tuple[int, ...] = (-1,),
    ) -> nnx.Param:
        """A weight drawn from normal(0, std) in float32 and rounded, or quantised.

        Args:
          part: the field of a :class:`Quantization` that says how it is; None is never quantised.
          contracted: its dimensions that are summed over, from the end, as :class:`QuantizedArray` has them.

        Raises:
          QuantizationError, MeshError: it cannot be quantised like that, or not on this mesh.
        """
        self.made += 1
        form = None if part is None or self.quantization is None else getattr(self.quantization, part)
        shapes = (
            jax.ShapeDtypeStruct(shape, self.dtype) if form is None else abstract(shape, form, contracted, self.dtype)
        )
        specs = self.partition.specs_of(shapes, axes)
        value: Any = shapes
        if self.key is not None:
            leaves, tree = jax.tree.flatten(self.partition.shardings(specs))
            draw = _drawer(shape, self.dtype, form, contracted, tuple(leaves), tree)
            value = draw(jax.random.fold_in(self.key, self.made), std)
        return nnx.Param(value, axes=axes, part=part, contracted=contracted)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, self.dtype), axes=axes)
        sharding = self.partition.sharding(self.partition.spec(axes))
        return nnx.Param(jnp.ones(shape, self.dtype, device=sharding), axes=axes)


@functools.lru_cache(maxsize=64)
def _drawer(shape: tuple[int, ...], dtype: jnp.dtype, form: Format | None, contracted: tuple[int, ...], leaves, tree):
    def draw(key, std):
        drawn = std * jax.random.normal(key, shape, jnp.float32)
        return drawn.astype(dtype) if form is None else quantize(drawn, form, contracted, dtype)

    # Not compiled on one device: compiling a program for each shape would take longer.
    return jax.jit(draw, out_shardings=jax.tree.unflatten(tree, leaves)) if leaves else draw
