"""The experts of one layer: a gated MLP each, applied to the tokens that the router sent there.

Dropless: every token is computed by every expert it chose, however uneven the choice. Expert e
maps x to (act(x w1_e^T) * (x v1_e^T)) w2_e, and a token's output is the weighted sum over its
experts. A weight is given as E arrays (F, D), one per expert, each in a buffer of its own; or as one
array (E, F, D), which is indexed the same way and which kernels take (:mod:`dbrx_jax.kernels`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from dbrx_jax.kernels.choice import ExpertKernels, expert_kernels
from dbrx_jax.ops.linear import Weight, dequantized, gated, linear
from dbrx_jax.quantization import QuantizedArray

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
# Rows of one matrix product in the grouped arrangement. On a CPU, where filled up rows cost, about as many as an
# expert has, up to where more are hardly faster, which with quantised weights is later; elsewhere so many that the
# product takes longer than reading the weights.
LEAST_TILE, LARGEST_TILE, LARGEST_TILE_QUANTIZED = 4, 32, 64
TILE_ELSEWHERE = 512
# Up to so many tokens, each expert that has some runs on all of them.
FEW_TOKENS = {"cpu": 1}
FEW_TOKENS_ELSEWHERE = 256
# Up to so many of them, an expert that no token chose is likely, and is skipped.
SKIP_TOKENS = 16


class ExpertWeights(NamedTuple):
    """Gate (w1), up (v1) and down (w2) projections of E experts, each (F, D) as in published checkpoints."""

    w1: Weight | Sequence[Weight]
    v1: Weight | Sequence[Weight]
    w2: Weight | Sequence[Weight]

    @property
    def stacked(self) -> bool:
        """Whether each is one array."""
        return isinstance(self.w1, Array | QuantizedArray)

    @property
    def number(self) -> int:
        """E."""
        return self.w1.shape[0] if isinstance(self.w1, Array | QuantizedArray) else len(self.w1)

    def one(self, e: int) -> tuple[Weight, Weight, Weight]:
        return self.w1[e], self.v1[e], self.w2[e]


def expert_mlp(
    x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, activation: str, platform: str
) -> Float[Array, "N D"]:
    """One expert with weights (F, D) on N rows: (act(x w1^T) * (x v1^T)) w2."""
    return linear(gated(x, w1, v1, ACTIVATIONS[activation], platform), w2, 0, platform)


def reference_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
) -> Float[Array, "N D"]:
    """The definition, word for word: every expert on every token, then the chosen ones summed."""

    def expert(w1: Array, v1: Array, w2: Array) -> Array:
        return (ACTIVATIONS[activation](x @ w1.T) * (x @ v1.T)) @ w2

    outputs = [expert(*map(dequantized, expert_weights.one(e))) for e in range(expert_weights.number)]
    chosen = jnp.take_along_axis(jnp.stack(outputs, axis=1), experts[:, :, None], axis=1)  # (N, K, D)
    return jnp.sum(chosen * weights[:, :, None].astype(x.dtype), axis=1)


def apply_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
    valid: Bool[Array, "N"] | None = None,
    platform: str = "cpu",
    tile: int | None = None,
) -> Float[Array, "N D"]:
    """The same sum as :func:`reference_experts`, computing only what was chosen.

    Args:
      experts: numbers below 0 or from E on are experts of other devices: what they give is left out.
      valid: False for rows whose output does not matter (padding); they cost nothing and give 0.
      platform: that of the devices, which decides on the arrangement.
      tile: rows of every matrix product, whatever N is, so that no bit of a row's result depends on N;
        None leaves that to the platform.
    """
    weights = weights.astype(x.dtype)
    here = (experts >= 0) & (experts < expert_weights.number)
    if valid is not None:
        here = here & valid[:, None]
    # One past the last expert: such rows sort behind all groups and match no expert.
    experts = jnp.where(here, experts, expert_weights.number)
    way = _way(x, experts, expert_weights, platform, tile)
    return _apply(x, weights, experts, expert_weights, activation, way)


class _Way(NamedTuple):
    """How the experts are applied."""

    platform: str
    few: bool  # tokens, or many
    tile: int  # rows of a product of many tokens
    kernels: ExpertKernels | None  # or XLA's own products


def _way(x: Array, experts: Array, expert_weights: ExpertWeights, platform: str, tile: int | None) -> _Way:
    """Chosen by platform, shapes and dtype. Kernels are not for products of a given number of rows."""
    tokens = x.shape[0]
    kernels = expert_kernels(platform) if tile is None and expert_weights.stacked else None
    if kernels is not None and kernels.take_few(x, *expert_weights):
        return _Way(platform, True, 0, kernels)
    few = tile is None and tokens <= FEW_TOKENS.get(platform, FEW_TOKENS_ELSEWHERE)
    if kernels is not None and kernels.take_many(x, *expert_weights):
        return _Way(platform, False, TILE_ELSEWHERE, kernels)
    if tile is None:
        tile = _tile(experts, expert_weights) if platform == "cpu" else TILE_ELSEWHERE
    return _Way(platform, few, tile, None)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _apply(x, weights, experts, expert_weights, activation, way):
    if way.kernels is not None:
        from dbrx_jax.kernels.experts import decode, grouped

        return (decode if way.few else grouped)(x, weights, experts, expert_weights, activation, way.kernels)
    if not way.few:
        return _many_tokens(x, weights, experts, expert_weights, activation, way.platform, way.tile)
    if way.platform == "cpu":
        return _one_token(x, weights, experts, expert_weights, activation, way.platform)
    return _few_tokens(x, weights, experts, expert_weights, activation, way.platform)


def _tile(experts: Array, expert_weights: ExpertWeights) -> int:
    """Rows of a matrix product on a CPU."""
    most = LARGEST_TILE_QUANTIZED if isinstance(expert_weights.w1[0], QuantizedArray) else LARGEST_TILE
    rows = experts.size / expert_weights.number  # that an expert has on average
    return min(1 << math.ceil(math.log2(max(LEAST_TILE, 1.5 * rows))), most)


def _one_token(x, weights, experts, expert_weights, activation, platform):
    """One token's experts, one after the other, by a branch for each: no other weight is read."""

    def branch(own: tuple[Weight, Weight, Weight]) -> Callable[[Array], Array]:
        return lambda x: expert_mlp(x, *own, activation, platform)

    branches = [branch(expert_weights.one(e)) for e in range(expert_weights.number)]
    branches.append(jnp.zeros_like)  # of an expert that is elsewhere

    def add(k, y):
        return y + weights[0, k] * lax.switch(experts[0, k], branches, x)

    return lax.fori_loop(0, experts.shape[1], add, jnp.zeros_like(x))


def _few_tokens(x, weights, experts, expert_weights, activation, platform):
    """Each chosen expert once, on all rows; the weights of the other experts are never read."""
    y = jnp.zeros_like(x)
    for e in range(expert_weights.number):

        def add(y, e=e):
            mine = experts == e  # (N, K)
            # Others' rows are taken out before, not multiplied by 0 after: an infinity of theirs would give NaN.
            rows = jnp.where(mine.any(axis=1, keepdims=True), x, 0)
            weight = jnp.sum(jnp.where(mine, weights, 0), axis=1, keepdims=True)
            return y + weight * expert_mlp(rows, *expert_weights.one(e), activation, platform)

        y = lax.cond((experts == e).any(), add, lambda y: y, y) if x.shape[0] <= SKIP_TOKENS else add(y)
    return y


class Groups(NamedTuple):
    """The (token, expert) pairs sorted by expert, those of E experts in P places: each pair's, were all to come."""

    order: Int[Array, "P"]  # place -> pair, a tile longer than the places
    inverse: Int[Array, "N K"]  # pair -> place
    here: Bool[Array, "N K"]  # whether the pair is of one of the experts
    ends: Int[Array, "E"]  # where each expert's places end
    starts: Int[Array, "E"]
    tile_rows: int

    def tiles(self, e: int) -> Array:
        return (self.ends[e] - self.starts[e] + self.tile_rows - 1) // self.tile_rows

    def tile(self, e: int, i: Array) -> tuple[Array, Array, Array]:
        """First place, pairs (M,) and whether each is the expert's own (M, 1), of expert e's tile i of M rows."""
        start = self.starts[e] + i * self.tile_rows
        own = start + jnp.arange(self.tile_rows) < self.ends[e]
        return start, lax.dynamic_slice(self.order, (start,), (self.tile_rows,)), own[:, None]

    def total(self, rows: Float[Array, "P D"], weights: Float[Array, "N K"]) -> Float[Array, "N D"]:
        """Each token's weighted sum of its rows, one of its K experts after the other to save memory."""
        y = jnp.zeros((weights.shape[0], rows.shape[1]), rows.dtype)
        for k in range(weights.shape[1]):
            y = y + jnp.where(self.here[:, k, None], rows[self.inverse[:, k]] * weights[:, k, None], 0)
        return y


def group(experts: Int[Array, "N K"], num_experts: int, tile_rows: int) -> Groups:
    """Sorts the pairs, with `tile_rows` places behind them."""
    N, K = experts.shape
    pairs = experts.reshape(-1)
    order = jnp.argsort(pairs, stable=True)
    sizes = jnp.sum(pairs[:, None] == jnp.arange(num_experts), axis=0)
    ends = jnp.cumsum(sizes)
    # A token goes to each expert once at most. A tile may reach past its expert's places, so one more lies behind.
    places = N * min(K, num_experts)
    inverse = jnp.minimum(jnp.argsort(order), places).reshape(N, K)
    return Groups(
        jnp.pad(order, (0, tile_rows))[: places + tile_rows],
        inverse,
        experts < num_experts,
        ends,
        ends - sizes,
        tile_rows,
    )


def _many_tokens(x, weights, experts, expert_weights, activation, platform, tile_rows):
    """Sorts the pairs by expert, and puts each expert's outputs in its rows' places, `tile_rows` at a time."""
    groups = group(experts, expert_weights.number, tile_rows)
    y = x[groups.order // experts.shape[1]]
    for e in range(expert_weights.number):

        def add(i, y, e=e):
            start, _, own = groups.tile(e, i)
            rows = lax.dynamic_slice(y, (start, 0), (tile_rows, y.shape[1]))
            return _write(y, start, own, expert_mlp(rows, *expert_weights.one(e), activation, platform))

        y = lax.fori_loop(0, groups.tiles(e), add, y)
    return groups.total(y, weights)


def _write(y: Array, start: Array, own: Array, rows: Array) -> Array:
    """Puts the expert's own rows into y, and leaves what else the tile reaches over as it is."""
    old = lax.dynamic_slice(y, (start, 0), rows.shape)
    return lax.dynamic_update_slice(y, jnp.where(own, rows, old), (start, 0))


def _forward(x, weights, experts, expert_weights, activation, way):
    y = _apply(x, weights, experts, expert_weights, activation, way)
    return y, (x, weights, experts, expert_weights)


def _backward(activation, way, saved, dy):
    x, _, experts, expert_weights = saved
    if way.kernels is not None and way.kernels.take_gradients(x, *expert_weights):
        from dbrx_jax.kernels.experts import grouped_gradients

        dx, dweights, by_weight = grouped_gradients(*saved, dy, activation, way.kernels)
    else:
        tile = way.tile or TILE_ELSEWHERE
        dx, dweights, by_weight = _gradients(*saved, dy, activation, way.platform, tile)
    return dx, dweights, np.zeros(experts.shape, jax.dtypes.float0), by_weight


def _gradients(x, weights, experts, expert_weights, dy, activation, platform, tile_rows):
    """Tile by tile again: recomputes each expert's rows and sums its weights' gradients in float32."""
    groups = group(experts, expert_weights.number, tile_rows)
    top_k = experts.shape[1]
    places = groups.order.shape[0]
    dx, dweights = jnp.zeros((places, x.shape[1]), x.dtype), jnp.zeros((places, 1), weights.dtype)
    gradients = []
    for e in range(expert_weights.number):
        own_weights = expert_weights.one(e)

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
    dx = groups.total(dx, jnp.ones_like(weights))
    dweights = jnp.where(groups.here, dweights[groups.inverse, 0], 0)
    stack = [jnp.stack if isinstance(w, Array) else tuple for w in expert_weights]
    by_weight = ExpertWeights(*(s(g) for s, g in zip(stack, zip(*gradients, strict=True), strict=True)))
    return dx, dweights, by_weight


_apply.defvjp(_forward, _backward)
