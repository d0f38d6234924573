"""Small-batch matmuls by the native kernels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

FLOATS = (jnp.float32, jnp.bfloat16)


def supports(x: Array, *weights: Weight) -> bool:
    """Returns whether the kernels multiply rows x with these weights, by dtypes; shapes can be any."""
    return x.dtype in FLOATS and x.shape[0] > 0 and all(w.dtype in FLOATS for w in weights)


def matmul(
    x: Float[Array, "N C"], weights: Sequence[Weight], contracted: int, dtype: DTypeLike, instruction_set: str = "best"
) -> list[Float[Array, "N M"]]:
    """Computes x w^T for each weight (M, C), or x w for each (C, M), summed in float32 and rounded once.

    A row's results do not depend on the other rows, nor on the number of threads.

    Args:
      instruction_set: one of :func:`dbrx_jax.kernels.cpu.library.instruction_sets`; else the best is used.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1 - contracted]), dtype) for w in weights]
    call = jax.ffi.ffi_call("dbrx_matmul", results)
    arrays = [a for w in weights for a in buffers(w)]
    return list(call(x, *arrays, contracts_rows=contracted == 0, instruction_set=instruction_set))


def buffers(weight: Weight) -> tuple[Array, ...]:
    """Returns the arrays of a weight as the kernels take them: values, and scales if it is quantised."""
    return (weight.values, weight.scale) if isinstance(weight, QuantizedArray) else (weight,)
