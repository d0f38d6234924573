"""Matmuls of activations with weights, with the implementation selected by platform, shapes and dtypes."""

from collections.abc import Sequence
from functools import partial

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dbrx_jax.kernels.dispatch import LinearKernels, linear_kernels
from dbrx_jax.ops.linear import Weight, linear


def linears(
    x: Float[Array, "N C"], weights: Sequence[Weight], platform: str, dtype: DTypeLike | None = None
) -> list[Array]:
    """Computes x w^T for weights (M, C), as :func:`dbrx_jax.ops.linear.linear` does; a kernel reads them together.

    Args:
      dtype: of the results; x's by default.
    """
    dtype, kernels = x.dtype if dtype is None else dtype, linear_kernels(platform)
    if kernels is not None and kernels.supports(x, *weights):
        return _kernel(x, tuple(weights), platform, dtype, kernels)
    return _plain(x, weights, platform, dtype)


def _plain(x: Array, weights: Sequence[Weight], platform: str, dtype: DTypeLike) -> list[Array]:
    return [linear(x, w, 1, platform, dtype) for w in weights]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kernel(x: Array, weights: tuple, platform: str, dtype: DTypeLike, kernels: LinearKernels) -> list[Array]:
    with jax.named_scope("few_rows_linear"):
        results = kernels.integer_linear(x, *weights, interpret=kernels.interpret)
    return [y.astype(dtype) for y in results]


def _forward(x, weights, platform, dtype, kernels):
    return _kernel(x, weights, platform, dtype, kernels), (x, weights)


def _backward(platform, dtype, kernels, residuals, dy):
    return jax.vjp(lambda x, weights: _plain(x, weights, platform, dtype), *residuals)[1](dy)


_kernel.defvjp(_forward, _backward)
