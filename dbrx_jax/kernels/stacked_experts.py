"""Applies the experts of one layer with Pallas kernels, which index one array (E, F, D) of weights.

Arguments are those of :func:`dbrx_jax.kernels.experts.apply_experts`; dy (N, D) is the gradient of its result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dbrx_jax.kernels.dispatch import ExpertKernels
from dbrx_jax.ops.experts import ACTIVATIONS, ActiveExperts, ExpertWeights, group, group_aligned
from dbrx_jax.quantization import QuantizedArray


def decode_experts(x, weights, experts, expert_weights, activation: str, kernels: ExpertKernels) -> Array:
    """Applies each active expert to all rows of a small batch; ignores expert indices from E on."""
    active = active_experts(weights, experts, expert_weights.num_experts)
    return apply_active_experts(x, active, expert_weights, activation, kernels)


def apply_active_experts(
    x: Float[Array, "N D"],
    active: ActiveExperts,
    expert_weights: ExpertWeights,
    activation: str,
    kernels: ExpertKernels,
    **options: Any,
) -> Float[Array, "N D"]:
    """Returns each token's weighted sum of its active experts' outputs.

    Args:
      options: more arguments of the decode kernel.
    """
    with jax.named_scope("decode_experts"):
        out = kernels.decode.decode_experts(
            x, *active, *expert_weights, activation=activation, interpret=kernels.interpret, **options
        )
    return out.astype(x.dtype)


def active_experts(weights: Float[Array, "N K"], experts: Int[Array, "N K"], num_experts: int) -> ActiveExperts:
    """Returns the active experts of experts 0 … E - 1; larger indices are ignored."""
    is_active = jnp.any(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0)
    active = jnp.argsort(~is_active, stable=True)[: min(num_experts, experts.size)].astype(jnp.int32)
    combine_weights = jnp.where(experts == active[:, None, None], weights, 0).astype(jnp.float32).sum(axis=-1)
    return ActiveExperts(active, is_active.sum(dtype=jnp.int32), combine_weights)


def grouped_experts(x, weights, experts, expert_weights, activation: str, kernels: ExpertKernels) -> Array:
    """Sorts the (token, expert) pairs by expert, and applies the experts in one kernel or by three grouped matmuls."""
    fused = kernels.fused
    if fused is not None and fused.supports(x, *expert_weights):
        return _fused_experts(x, weights, experts, expert_weights, activation, fused, kernels.interpret)
    groups = group(experts, expert_weights.num_experts, 0)
    product = _product(kernels, groups.ends - groups.starts)
    rows = x[groups.order // experts.shape[1]]
    gate, up = product(rows, expert_weights.w1, 1), product(rows, expert_weights.v1, 1)
    return groups.combine(product(ACTIVATIONS[activation](gate) * up, expert_weights.w2, 0), weights)


def _fused_experts(x, weights, experts, expert_weights, activation: str, fused: Any, interpret: Any) -> Array:
    top_k, num_experts = experts.shape[1], expert_weights.num_experts
    num_rows = fused.ROW_TILE * fused.num_row_tiles(x.shape[0] * min(top_k, num_experts), num_experts)
    groups = group_aligned(experts, num_experts, fused.ROW_TILE, num_rows)
    columns = jnp.split(fused.permuted_columns(x, expert_weights.w1), fused.num_column_parts(num_rows, x), axis=1)
    rows = [part[groups.order // top_k] for part in columns]
    with jax.named_scope("grouped_experts"):
        sizes = groups.ends - groups.starts
        out = fused.grouped_experts(rows, sizes, *expert_weights, activation=activation, interpret=interpret)
    return jnp.concatenate([groups.combine(part, weights) for part in out], axis=1)


def grouped_expert_gradients(
    x, weights, experts, expert_weights, dy, activation: str, kernels: ExpertKernels
) -> tuple[Array, Array, ExpertWeights]:
    """Returns the gradients of :func:`grouped_experts` for x, weights and plain expert weights; recomputes the rest."""
    w1, v1, w2 = expert_weights
    assert isinstance(w1, Array)
    groups = group(experts, expert_weights.num_experts, 0)
    sizes = groups.ends - groups.starts
    product = _product(kernels, sizes)
    tokens = groups.order // experts.shape[1]
    rows, dout = x[tokens], dy[tokens]

    def inner(gate: Array, up: Array) -> Array:
        return ACTIVATIONS[activation](gate) * up

    h, pull = jax.vjp(inner, product(rows, w1, 1), product(rows, v1, 1))
    dh = product(dout, w2, 1)
    dweights = jnp.sum((h * dh).astype(jnp.float32), axis=1).astype(weights.dtype)
    scale = weights.reshape(-1, 1)[groups.order]
    dgate, dup = pull(dh * scale)
    drows = product(dgate, w1, 0) + product(dup, v1, 0)
    by_weight = (
        kernels.gradient(left, right, sizes, interpret=kernels.interpret).astype(w1.dtype)
        for left, right in ((dgate, rows), (dup, rows), (h, dout * scale))
    )
    dx = groups.combine(drows, jnp.ones_like(weights))
    return dx, jnp.where(groups.is_local, dweights[groups.inverse], 0), ExpertWeights(*by_weight)


def _product(kernels: ExpertKernels, sizes: Int[Array, "E"]) -> Callable[[Array, Any, int], Array]:
    """Returns a grouped matmul of rows (P, C), sorted by expert, with each expert's weight."""

    def product(rows: Array, weight: Array | QuantizedArray, contracted: int) -> Array:
        with jax.named_scope("grouped_matmul"):
            return kernels.grouped.grouped_matmul(rows, weight, contracted, sizes, interpret=kernels.interpret)

    return product
