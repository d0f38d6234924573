"""The experts of one layer in plain XLA: one token, small batches, and tiles of tokens sorted by expert."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from dbrx_jax.ops.experts import ExpertWeights, expert_mlp, group
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

# Rows of one matmul of sorted tokens. On a CPU, where padding costs, about as many as an expert has, up to where
# more are hardly faster, which is later with quantised weights; elsewhere so many that the matmul takes longer than
# reading the weights.
MIN_TILE, MAX_TILE, MAX_TILE_QUANTIZED = 4, 32, 64
TILE_ON_ACCELERATOR = 512
# Up to so many tokens inactive experts are likely, and are skipped.
SKIP_TOKENS = 16


def tile_rows(experts: Array, expert_weights: ExpertWeights) -> int:
    """Rows of a matrix product on a CPU."""
    most = MAX_TILE_QUANTIZED if isinstance(expert_weights.w1[0], QuantizedArray) else MAX_TILE
    rows = experts.size / expert_weights.num_experts  # that an expert has on average
    return min(1 << math.ceil(math.log2(max(MIN_TILE, 1.5 * rows))), most)


def one_token_experts(x, weights, experts, expert_weights, activation, platform):
    """One token's experts, one after the other, by a branch for each: no other weight is read."""

    def branch(own: tuple[Weight, Weight, Weight]) -> Callable[[Array], Array]:
        return lambda x: expert_mlp(x, *own, activation, platform)

    branches = [branch(expert_weights.expert(e)) for e in range(expert_weights.num_experts)]
    branches.append(jnp.zeros_like)  # of an expert that is elsewhere

    def add(k, y):
        return y + weights[0, k] * lax.switch(experts[0, k], branches, x)

    return lax.fori_loop(0, experts.shape[1], add, jnp.zeros_like(x))


def small_batch_experts(x, weights, experts, expert_weights, activation, platform):
    """Each chosen expert once, on all rows; the weights of the other experts are never read."""
    y = jnp.zeros_like(x)
    for e in range(expert_weights.num_experts):

        def add(y, e=e):
            mine = experts == e  # (N, K)
            # Others' rows are taken out before, not multiplied by 0 after: an infinity of theirs would give NaN.
            rows = jnp.where(mine.any(axis=1, keepdims=True), x, 0)
            weight = jnp.sum(jnp.where(mine, weights, 0), axis=1, keepdims=True)
            return y + weight * expert_mlp(rows, *expert_weights.expert(e), activation, platform)

        y = lax.cond((experts == e).any(), add, lambda y: y, y) if x.shape[0] <= SKIP_TOKENS else add(y)
    return y


def grouped_experts(x, weights, experts, expert_weights, activation, platform, tile_rows):
    """Sorts the pairs by expert, and puts each expert's outputs in its rows' places, `tile_rows` at a time."""
    groups = group(experts, expert_weights.num_experts, tile_rows)
    y = x[groups.order // experts.shape[1]]
    for e in range(expert_weights.num_experts):

        def add(i, y, e=e):
            start, _, own = groups.tile(e, i)
            rows = lax.dynamic_slice(y, (start, 0), (tile_rows, y.shape[1]))
            return _write(y, start, own, expert_mlp(rows, *expert_weights.expert(e), activation, platform))

        y = lax.fori_loop(0, groups.tiles(e), add, y)
    return groups.combine(y, weights)


def _write(y: Array, start: Array, own: Array, rows: Array) -> Array:
    """Puts the expert's own rows into y, and leaves what else the tile reaches over as it is."""
    old = lax.dynamic_slice(y, (start, 0), rows.shape)
    return lax.dynamic_update_slice(y, jnp.where(own, rows, old), (start, 0))


def grouped_expert_gradients(x, weights, experts, expert_weights, dy, activation, platform, tile_rows):
    """Tile by tile again: recomputes each expert's rows and sums its weights' gradients in float32."""
    groups = group(experts, expert_weights.num_experts, tile_rows)
    top_k = experts.shape[1]
    places = groups.order.shape[0]
    dx, dweights = jnp.zeros((places, x.shape[1]), x.dtype), jnp.zeros((places, 1), weights.dtype)
    gradients = []
    for e in range(expert_weights.num_experts):
        own_weights = expert_weights.expert(e)

        def add(i, carry, e=e, own_weights=own_weights):
            dx, dweights, sums = carry
            start, pairs, own = groups.tile(e, i)
            tokens = pairs // top_k
            # What else the tile reaches over is taken out, so that nothing of it comes into the weights' sums.
            rows, dout = jnp.where(own, x[tokens], 0), jnp.where(own, dy[tokens], 0)
            out, pull = jax.vjp(lambda *a: expert_mlp(*a, activation, platform), rows, *own_weights)
            dx_rows, *dw = pull(dout * weights.reshape(-1, 1)[pairs])
            dweight_rows = jnp.sum(out * dout, axis=1, keepdims=True).astype(weights.dtype)
            sums = tuple(s + d.astype(jnp.float32) for s, d in zip(sums, dw, strict=True))
            return _write(dx, start, own, dx_rows), _write(dweights, start, own, dweight_rows), sums

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in own_weights)
        dx, dweights, sums = lax.fori_loop(0, groups.tiles(e), add, (dx, dweights, zeros))
        gradients.append(tuple(s.astype(w.dtype) for s, w in zip(sums, own_weights, strict=True)))
    dx = groups.combine(dx, jnp.ones_like(weights))
    dweights = jnp.where(groups.is_local, dweights[groups.inverse, 0], 0)
    stack = [jnp.stack if isinstance(w, Array) else tuple for w in expert_weights]
    by_weight = ExpertWeights(*(s(g) for s, g in zip(stack, zip(*gradients, strict=True), strict=True)))
    return dx, dweights, by_weight
