"""Experts of one layer in plain XLA: for one token, small batches, and tiles of tokens sorted by expert.

Arguments are those of :func:`dbrx_jax.kernels.experts.apply_experts`; experts that are not local have the number E.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.ops.experts import ExpertWeights, expert_mlp, group
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

# Limits of the rows of a matmul on a CPU. More than the maximum are hardly faster, and need more padding.
MIN_TILE, MAX_TILE, MAX_TILE_QUANTIZED = 4, 32, 64
ACCELERATOR_TILE_ROWS = 512  # elsewhere: a matmul then takes longer than reading its weight
SKIP_TOKENS = 16  # with more tokens, inactive experts are too unlikely to test for


def cpu_tile_rows(experts: Array, expert_weights: ExpertWeights) -> int:
    """Returns the rows of a matmul on a CPU: 1.5 times the average rows per expert, rounded up to a power of two."""
    most = MAX_TILE_QUANTIZED if isinstance(expert_weights.w1[0], QuantizedArray) else MAX_TILE
    rows_per_expert = experts.size / expert_weights.num_experts
    return min(1 << math.ceil(math.log2(max(MIN_TILE, 1.5 * rows_per_expert))), most)


def one_token_experts(x, weights, experts, expert_weights, activation, platform):
    """Applies the experts of one token in order, each in a branch of its own, so no other weight is read."""

    def branch(weights_e: tuple[Weight, Weight, Weight]) -> Callable[[Array], Array]:
        return lambda x: expert_mlp(x, *weights_e, activation, platform)

    branches = [branch(expert_weights.expert(e)) for e in range(expert_weights.num_experts)]
    branches.append(jnp.zeros_like)  # for an expert of another device

    def add(k, y):
        return y + weights[0, k] * lax.switch(experts[0, k], branches, x)

    return lax.fori_loop(0, experts.shape[1], add, jnp.zeros_like(x))


def small_batch_experts(x, weights, experts, expert_weights, activation, platform):
    """Applies each expert to all rows. Up to SKIP_TOKENS rows, weights of inactive experts are not read."""
    y = jnp.zeros_like(x)
    for e in range(expert_weights.num_experts):

        def add(y, e=e):
            is_routed = experts == e  # (N, K)
            # Zeroes other rows before the expert: 0 times an infinite output would be NaN.
            rows = jnp.where(is_routed.any(axis=1, keepdims=True), x, 0)
            weight = jnp.sum(jnp.where(is_routed, weights, 0), axis=1, keepdims=True)
            return y + weight * expert_mlp(rows, *expert_weights.expert(e), activation, platform)

        y = lax.cond((experts == e).any(), add, lambda y: y, y) if x.shape[0] <= SKIP_TOKENS else add(y)
    return y


def grouped_experts(x, weights, experts, expert_weights, activation, platform, tile_rows):
    """Sorts the (token, expert) pairs by expert and applies each expert to its rows, `tile_rows` at a time."""
    groups = group(experts, expert_weights.num_experts, tile_rows)
    y = x[groups.order // experts.shape[1]]
    for e in range(expert_weights.num_experts):

        def add(i, y, e=e):
            start, _, in_group = groups.tile(e, i)
            rows = lax.dynamic_slice(y, (start, 0), (tile_rows, y.shape[1]))
            return _write(y, start, in_group, expert_mlp(rows, *expert_weights.expert(e), activation, platform))

        y = lax.fori_loop(0, groups.num_tiles(e), add, y)
    return groups.combine(y, weights)


def _write(y: Array, start: Array, in_group: Array, rows: Array) -> Array:
    """Writes a tile's rows to y from `start` on, but only those that belong to its expert."""
    old = lax.dynamic_slice(y, (start, 0), rows.shape)
    return lax.dynamic_update_slice(y, jnp.where(in_group, rows, old), (start, 0))


def grouped_expert_gradients(x, weights, experts, expert_weights, dy, activation, platform, tile_rows):
    """Returns the gradients of x, weights and expert_weights; recomputes each tile, and sums gradients in float32."""
    groups = group(experts, expert_weights.num_experts, tile_rows)
    top_k = experts.shape[1]
    num_rows, gradients = groups.order.size, []
    dx, dweights = jnp.zeros((num_rows, x.shape[1]), x.dtype), jnp.zeros((num_rows, 1), weights.dtype)
    for e in range(expert_weights.num_experts):
        expert_weights_e = expert_weights.expert(e)

        def add(i, carry, e=e, expert_weights_e=expert_weights_e):
            dx, dweights, sums = carry
            start, pairs, in_group = groups.tile(e, i)
            tokens = pairs // top_k
            # Rows of other experts in the tile must not add to the weights' gradients.
            rows, dout = jnp.where(in_group, x[tokens], 0), jnp.where(in_group, dy[tokens], 0)
            out, vjp = jax.vjp(lambda *a: expert_mlp(*a, activation, platform), rows, *expert_weights_e)
            dx_rows, *dw = vjp(dout * weights.reshape(-1, 1)[pairs])
            dweight_rows = jnp.sum(out * dout, axis=1, keepdims=True).astype(weights.dtype)
            sums = tuple(s + d.astype(jnp.float32) for s, d in zip(sums, dw, strict=True))
            return _write(dx, start, in_group, dx_rows), _write(dweights, start, in_group, dweight_rows), sums

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in expert_weights_e)
        dx, dweights, sums = lax.fori_loop(0, groups.num_tiles(e), add, (dx, dweights, zeros))
        gradients.append(tuple(s.astype(w.dtype) for s, w in zip(sums, expert_weights_e, strict=True)))
    dx = groups.combine(dx, jnp.ones_like(weights))
    dweights = jnp.where(groups.is_local, dweights[groups.inverse, 0], 0)
    stack = [jnp.stack if isinstance(w, Array) else tuple for w in expert_weights]
    by_weight = ExpertWeights(*(s(g) for s, g in zip(stack, zip(*gradients, strict=True), strict=True)))
    return dx, dweights, by_weight
