"""Weights and reference implementation of a layer's experts, and sorting of tokens by expert.

Expert e is a gated MLP: (act(x w1_e^T) * (x v1_e^T)) w2_e. A token's output is the weighted sum over its experts.
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

_gelu_tanh = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # by the error function
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
}


class ExpertWeights(NamedTuple):
    """Gate (w1), up (v1) and down (w2) projections of E experts, each (F, D) as in published checkpoints."""

    w1: Weight | Sequence[Weight]
    v1: Weight | Sequence[Weight]
    w2: Weight | Sequence[Weight]

    @property
    def stacked(self) -> bool:
        """True if each projection is one array (E, F, D), false if it is a sequence of E arrays."""
        return isinstance(self.w1, Array | QuantizedArray)

    @property
    def num_experts(self) -> int:
        return self.w1.shape[0] if isinstance(self.w1, Array | QuantizedArray) else len(self.w1)

    def expert(self, e: int) -> tuple[Weight, Weight, Weight]:
        return self.w1[e], self.v1[e], self.w2[e]


class ActiveExperts(NamedTuple):
    """Experts that a small batch of N tokens is routed to."""

    active: Int[Array, "C"]  # distinct; entries from num_active on are inactive experts, or repeat others
    num_active: Int[Array, ""]
    combine_weights: Float[Array, "C N"]  # float32, of each for each token; 0 if the token is not routed to it


def expert_mlp(
    x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, activation: str, platform: str
) -> Float[Array, "N D"]:
    """Applies one expert with weights (F, D) to N rows: (act(x w1^T) * (x v1^T)) w2."""
    return linear(gated(x, w1, v1, ACTIVATIONS[activation], platform), w2, 0, platform)


def reference_experts(
    x: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    experts: Int[Array, "N K"],
    expert_weights: ExpertWeights,
    activation: str,
) -> Float[Array, "N D"]:
    """Applies every expert to every token, then sums the outputs of each token's experts with their weights."""
    outputs = []
    for e in range(expert_weights.num_experts):
        w1, v1, w2 = map(dequantized, expert_weights.expert(e))
        outputs.append((ACTIVATIONS[activation](x @ w1.T) * (x @ v1.T)) @ w2)
    active = jnp.take_along_axis(jnp.stack(outputs, axis=1), experts[:, :, None], axis=1)  # (N, K, D)
    return jnp.sum(active * weights[:, :, None].astype(x.dtype), axis=1)


class Groups(NamedTuple):
    """Pairs of token n and its k-th expert, sorted by expert: P rows, those of E local experts first, then padding."""

    order: Int[Array, "P"]  # each row's pair, as n K + k
    inverse: Int[Array, "N K"]  # the row of each pair
    is_local: Bool[Array, "N K"]  # whether the pair's expert is local
    ends: Int[Array, "E"]  # first row after each expert's
    starts: Int[Array, "E"]  # first row of each expert
    tile_rows: int

    def num_tiles(self, e: int) -> Array:
        """Returns the number of tiles of `tile_rows` rows that hold expert e's rows; the last may be partly full."""
        return (self.ends[e] - self.starts[e] + self.tile_rows - 1) // self.tile_rows

    def tile(self, e: int, i: Array) -> tuple[Array, Array, Array]:
        """Returns expert e's tile i: first row, M pairs n K + k, and a mask (M, 1) of the expert's own rows."""
        start = self.starts[e] + i * self.tile_rows
        mask = start + jnp.arange(self.tile_rows) < self.ends[e]
        return start, lax.dynamic_slice(self.order, (start,), (self.tile_rows,)), mask[:, None]

    def combine(self, rows: Float[Array, "P D"], weights: Float[Array, "N K"]) -> Float[Array, "N D"]:
        """Returns each token's weighted sum of its local experts' outputs `rows`."""
        y = jnp.zeros((weights.shape[0], rows.shape[1]), rows.dtype)
        rank = jnp.cumsum(self.is_local, axis=1) - 1  # among the token's local experts
        for i in range(min(weights.shape[1], self.ends.shape[0])):  # one at a time, to save memory
            is_next = self.is_local & (rank == i)
            row = jnp.sum(jnp.where(is_next, self.inverse, 0), axis=1)
            weight = jnp.sum(jnp.where(is_next, weights, 0), axis=1, keepdims=True)
            y = y + jnp.where(is_next.any(axis=1)[:, None], rows[row] * weight, 0)
        return y


def group(experts: Int[Array, "N K"], num_experts: int, tile_rows: int) -> Groups:
    """Sorts pairs of token and expert by expert, and adds `tile_rows` rows of padding; experts 0 … E - 1 are local."""
    N, K = experts.shape
    pairs = experts.reshape(-1)
    order = jnp.argsort(pairs, stable=True)
    sizes = jnp.sum(pairs[:, None] == jnp.arange(num_experts), axis=0)
    ends = jnp.cumsum(sizes)
    # Each token has a local expert at most once, which bounds the rows. The last tile may reach into the padding.
    num_rows = N * min(K, num_experts)
    order_padded = jnp.pad(order, (0, tile_rows))[: num_rows + tile_rows]
    inverse = jnp.minimum(jnp.argsort(order), num_rows).reshape(N, K)
    return Groups(order_padded, inverse, experts < num_experts, ends, ends - sizes, tile_rows)


def group_aligned(experts: Int[Array, "N K"], num_experts: int, multiple: int, num_rows: int) -> Groups:
    """Sorts pairs as :func:`group` does, into `num_rows` rows: each expert's begin at the next multiple of `multiple`.

    Rows between the experts' have any pair. Written without a second sort or a gather of `order`, each of which takes a
    TPU's compiler half a second per layer.
    """
    N, K = experts.shape
    pairs = experts.reshape(-1)
    is_routed = pairs[:, None] == jnp.arange(num_experts)
    ranks = jnp.cumsum(is_routed, axis=0, dtype=jnp.int32)
    sizes = ranks[-1]
    ends = jnp.cumsum((sizes + multiple - 1) // multiple * multiple)
    starts = jnp.append(jnp.zeros(1, jnp.int32), ends[:-1])
    inverse = jnp.sum(jnp.where(is_routed, starts + ranks - 1, 0), axis=1).reshape(N, K)
    # `order` without alignment; an expert's rows are moved down by as many rows as those before it were padded.
    shifts = starts - (jnp.cumsum(sizes) - sizes)
    padded = jnp.pad(jnp.argsort(pairs, stable=True), (num_rows, max(num_rows - N * K, 0)))
    order, row = jnp.zeros(num_rows, jnp.int32), jnp.arange(num_rows)
    for e in range(num_experts):
        order = jnp.where(row >= starts[e], lax.dynamic_slice(padded, (num_rows - shifts[e],), (num_rows,)), order)
    return Groups(order, inverse, experts < num_experts, starts + sizes, starts, 0)
