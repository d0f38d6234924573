"""Experts of small batches by the native kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from dbrx_jax.kernels.cpu import matmul
from dbrx_jax.ops.experts import ExpertWeights

# Numbers of the activations in native/kernels.h.
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}


def supports(x: Array, expert_weights: ExpertWeights) -> bool:
    """Returns whether the kernels apply experts of these weights, by dtypes; shapes can be any."""
    if expert_weights.stacked:
        return False
    experts = (expert_weights.expert(e) for e in range(expert_weights.num_experts))
    return matmul.supports(x, *(w for weights in experts for w in weights))


def apply_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
    instruction_set: str = "best",
) -> Float[Array, "N D"]:
    """Applies each expert to its own rows, reading its weights once, and sums each token's outputs by weights.

    Experts below 0 and from E on are left out. A token's result does not depend on the others, nor on the number of
    threads.
    """
    arrays = [a for e in range(expert_weights.num_experts) for w in expert_weights.expert(e) for a in matmul.buffers(w)]
    call = jax.ffi.ffi_call("dbrx_experts", jax.ShapeDtypeStruct(x.shape, x.dtype))
    weights, experts = weights.astype(jnp.float32), experts.astype(jnp.int32)
    number = np.int32(ACTIVATIONS[activation])
    return call(x, weights, experts, *arrays, activation=number, instruction_set=instruction_set)
