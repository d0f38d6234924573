"""The experts of one layer by their definition: a gated MLP each, applied to the tokens routed to it.

Expert e maps x to (act(x w1_e^T) * (x v1_e^T)) w2_e, and a token's output is the weighted sum over its experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from dbrx_jax.ops.linear import Weight, dequantized, gated, linear
from dbrx_jax.quantization import QuantizedArray

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class ExpertWeights(NamedTuple):
    """Gate (w1), up (v1) and down (w2) projections of E experts, each (F, D) as in published checkpoints."""

    w1: Weight | Sequence[Weight]
    v1: Weight | Sequence[Weight]
    w2: Weight | Sequence[Weight]

    @property
    def stacked(self) -> bool:
        """Whether each projection is one array (E, F, D)."""
        return isinstance(self.w1, Array | QuantizedArray)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w1.shape[0] if isinstance(self.w1, Array | QuantizedArray) else len(self.w1)

    def expert(self, e: int) -> tuple[Weight, Weight, Weight]:
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

    outputs = [expert(*map(dequantized, expert_weights.expert(e))) for e in range(expert_weights.num_experts)]
    chosen = jnp.take_along_axis(jnp.stack(outputs, axis=1), experts[:, :, None], axis=1)  # (N, K, D)
    return jnp.sum(chosen * weights[:, :, None].astype(x.dtype), axis=1)


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
    # A token goes to each expert at most once. A tile may reach past its expert's rows, so one more tile is padding.
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
