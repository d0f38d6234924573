"""Matmuls of activations with weights, with the implementation selected by platform, shapes and dtypes."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dbrx_jax.kernels.dispatch import linear_kernels, native_kernels
from dbrx_jax.ops import linear as xla
from dbrx_jax.ops.linear import Weight


def linear(
    x: Float[Array, "N C"], weight: Weight, contracted: int, platform: str, dtype: DTypeLike | None = None
) -> Float[Array, "N M"]:
    """Computes x w^T for a weight (M, C), or x w for (C, M), as :func:`dbrx_jax.ops.linear.linear` does."""
    return linears(x, [weight], contracted, platform, dtype)[0]


def linears(
    x: Float[Array, "N C"], weights: Sequence[Weight], contracted: int, platform: str, dtype: DTypeLike | None = None
) -> list[Float[Array, "N M"]]:
    """Computes :func:`linear` of the same rows with each of several weights."""
    dtype = x.dtype if dtype is None else dtype
    if _kernel(x, weights, contracted, platform) is None:
        return _xla_linears(x, weights, contracted, platform, dtype)
    return _kernel_linears(x, list(weights), contracted, platform, dtype)


def _kernel(x: Array, weights: Sequence[Weight], contracted: int, platform: str) -> Callable[..., list[Array]] | None:
    """Returns the kernel for these shapes and dtypes, a function of (x, weights, contracted, dtype), or None."""
    gpu, native = linear_kernels(platform), native_kernels(platform)
    if gpu is not None and contracted == 1 and gpu.supports(x, *weights):

        def integer_linear(x, weights, _, dtype):
            with jax.named_scope("few_rows_linear"):
                return [y.astype(dtype) for y in gpu.integer_linear(x, *weights, interpret=gpu.interpret)]

        return integer_linear
    if native is not None and native.matmul.supports(x, *weights):
        return native.matmul.matmul
    return None


def _xla_linears(x, weights, contracted, platform, dtype):
    return [xla.linear(x, w, contracted, platform, dtype) for w in weights]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kernel_linears(x, weights, contracted, platform, dtype):
    kernel = _kernel(x, weights, contracted, platform)
    assert kernel is not None
    return kernel(x, weights, contracted, dtype)


def _forward(x, weights, contracted, platform, dtype):
    return _kernel_linears(x, weights, contracted, platform, dtype), (x, weights)


def _backward(contracted, platform, dtype, residuals, dy):
    _, pull = jax.vjp(lambda x, weights: _xla_linears(x, weights, contracted, platform, dtype), *residuals)
    return pull(dy)


_kernel_linears.defvjp(_forward, _backward)
