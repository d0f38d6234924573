"""The experts of one layer: a gated MLP each, applied to the tokens that the router sent there.

Dropless: every token is computed by every expert it chose, however uneven the choice. Expert e
maps x to (act(x w1_e^T) * (x v1_e^T)) w2_e, and a token's output is the weighted sum over its
experts. A weight is given as E arrays (F, D), one per expert, each in a buffer of its own; one
array (E, F, D) is indexed the same way.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
# Rows of one matrix product in the grouped arrangement: on a CPU 64 was 1.5 times as fast as 32.
TILE = 64
# Up to so many tokens, each expert that was chosen runs on all of them: gathering rows costs more.
FEW_TOKENS = 16


class ExpertWeights(NamedTuple):
    """Gate (w1), up (v1) and down (w2) projections of E experts, each (F, D) as in published checkpoints."""

    w1: Sequence[Float[Array, "F D"]]
    v1: Sequence[Float[Array, "F D"]]
    w2: Sequence[Float[Array, "F D"]]

    def one(self, e: int) -> tuple[Array, Array, Array]:
        return self.w1[e], self.v1[e], self.w2[e]


def expert_mlp(
    x: Float[Array, "N D"],
    w1: Float[Array, "F D"],
    v1: Float[Array, "F D"],
    w2: Float[Array, "F D"],
    activation: str,
) -> Float[Array, "N D"]:
    """One expert on N rows: (act(x w1^T) * (x v1^T)) w2."""
    return (ACTIVATIONS[activation](x @ w1.T) * (x @ v1.T)) @ w2


def reference_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
) -> Float[Array, "N D"]:
    """The definition, word for word: every expert on every token, then the chosen ones summed."""
    outputs = [expert_mlp(x, *expert_weights.one(e), activation) for e in range(len(expert_weights.w1))]
    chosen = jnp.take_along_axis(jnp.stack(outputs, axis=1), experts[:, :, None], axis=1)  # (N, K, D)
    return jnp.sum(chosen * weights[:, :, None].astype(x.dtype), axis=1)


def apply_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, "N D"]:
    """The same sum as :func:`reference_experts`, computing only what was chosen.

    Args:
      valid: False for rows whose output does not matter (padding); they cost nothing and give 0.
    """
    weights = weights.astype(x.dtype)
    if valid is not None:
        # One past the last expert: such rows sort behind all groups and match no expert.
        experts = jnp.where(valid[:, None], experts, len(expert_weights.w1))
    if x.shape[0] <= FEW_TOKENS:
        return _few_tokens(x, weights, experts, expert_weights, activation)
    return _many_tokens(x, weights, experts, expert_weights, activation)


def _few_tokens(x, weights, experts, expert_weights, activation):
    """Each chosen expert once, on all rows; the weights of the other experts are never read."""
    y = jnp.zeros_like(x)
    for e in range(len(expert_weights.w1)):
        mine = experts == e  # (N, K)
        weight = jnp.sum(jnp.where(mine, weights, 0), axis=1, keepdims=True)

        def add(y, e=e, mine=mine, weight=weight):
            out = expert_mlp(x, *expert_weights.one(e), activation)
            # Not a product with 0: a row's infinity in an expert it did not choose must not reach it.
            return jnp.where(mine.any(axis=1, keepdims=True), y + weight * out, y)

        y = lax.cond(mine.any(), add, lambda y: y, y)
    return y


class _Groups(NamedTuple):
    """The N * K (token, expert) pairs, sorted by expert."""

    order: Int[Array, "P"]  # place in the sorted list -> pair, TILE entries longer than the list
    inverse: Int[Array, "N*K"]  # pair -> place in the sorted list
    ends: Int[Array, "E"]  # where each expert's places end
    starts: Int[Array, "E"]

    def tiles(self, e: int) -> Array:
        return (self.ends[e] - self.starts[e] + TILE - 1) // TILE

    def tile(self, e: int, i: Array) -> tuple[Array, Array, Array]:
        """First place, pairs (TILE,) and whether each is the expert's own (TILE, 1), of expert e's tile i."""
        start = self.starts[e] + i * TILE
        own = start + jnp.arange(TILE) < self.ends[e]
        return start, lax.dynamic_slice(self.order, (start,), (TILE,)), own[:, None]


def _group(experts: Int[Array, "N K"], num_experts: int) -> _Groups:
    pairs = experts.reshape(-1)
    order = jnp.argsort(pairs, stable=True)
    sizes = jnp.sum(pairs[:, None] == jnp.arange(num_experts), axis=0)
    ends = jnp.cumsum(sizes)
    # A tile may reach past its expert's places, so one more tile lies behind the last.
    return _Groups(jnp.pad(order, (0, TILE)), jnp.argsort(order), ends, ends - sizes)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _many_tokens(x, weights, experts, expert_weights, activation):
    """Sorts the pairs by expert and runs each expert's rows through it, TILE at a time."""
    groups = _group(experts, len(expert_weights.w1))
    top_k = experts.shape[1]
    y = jnp.zeros((groups.order.shape[0], x.shape[1]), x.dtype)
    for e in range(len(expert_weights.w1)):

        def add(i, y, e=e):
            start, pairs, own = groups.tile(e, i)
            out = expert_mlp(x[pairs // top_k], *expert_weights.one(e), activation)
            return _write(y, start, own, out)

        y = lax.fori_loop(0, groups.tiles(e), add, y)
    y = y[groups.inverse].reshape(*experts.shape, -1)  # (N, K, D)
    return jnp.sum(y * weights[:, :, None], axis=1)


def _write(y: Array, start: Array, own: Array, rows: Array) -> Array:
    """Puts the expert's own rows into y, and leaves what else the tile reaches over as it is."""
    old = lax.dynamic_slice(y, (start, 0), rows.shape)
    return lax.dynamic_update_slice(y, jnp.where(own, rows, old), (start, 0))


def _many_tokens_forward(x, weights, experts, expert_weights, activation):
    return _many_tokens(x, weights, experts, expert_weights, activation), (x, weights, experts, expert_weights)


def _many_tokens_backward(activation, saved, dy):
    """Tile by tile again: recomputes each expert's rows and sums its weights' gradients in float32."""
    x, weights, experts, expert_weights = saved
    groups = _group(experts, len(expert_weights.w1))
    top_k = experts.shape[1]
    places = groups.order.shape[0]
    dx, dweights = jnp.zeros((places, x.shape[1]), x.dtype), jnp.zeros((places, 1), weights.dtype)
    gradients = []
    for e in range(len(expert_weights.w1)):
        own_weights = expert_weights.one(e)

        def add(i, carry, e=e, own_weights=own_weights):
            dx, dweights, sums = carry
            start, pairs, own = groups.tile(e, i)
            rows = pairs // top_k
            out, pull = jax.vjp(lambda *a: expert_mlp(*a, activation), x[rows], *own_weights)
            dout = jnp.where(own, dy[rows], 0)
            dx_rows, *dw = pull(dout * weights.reshape(-1, 1)[pairs])
            dweight_rows = jnp.sum(out * dout, axis=1, keepdims=True).astype(weights.dtype)
            sums = tuple(s + d.astype(jnp.float32) for s, d in zip(sums, dw, strict=True))
            return _write(dx, start, own, dx_rows), _write(dweights, start, own, dweight_rows), sums

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in own_weights)
        dx, dweights, sums = lax.fori_loop(0, groups.tiles(e), add, (dx, dweights, zeros))
        gradients.append(tuple(s.astype(w.dtype) for s, w in zip(sums, own_weights, strict=True)))
    dx = dx[groups.inverse].reshape(*experts.shape, -1).sum(axis=1)
    dweights = dweights[groups.inverse].reshape(weights.shape)
    stack = [jnp.stack if isinstance(w, Array) else tuple for w in expert_weights]
    by_weight = ExpertWeights(*(s(g) for s, g in zip(stack, zip(*gradients, strict=True), strict=True)))
    return dx, dweights, np.zeros(experts.shape, jax.dtypes.float0), by_weight


_many_tokens.defvjp(_many_tokens_forward, _many_tokens_backward)
