"""Block of the decoder: attention and mixture of experts, each with a residual connection and layer norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.attention import Attention
from dbrx_jax.model.cache import LayerCache
from dbrx_jax.model.moe import MoE
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.routing import Routing
from dbrx_jax.ops.row_tiles import ROW_TILE, map_row_tiles
from dbrx_jax.sharding.partition import Partition


class Norm(nnx.Module):
    """Layer normalisation with a scale only."""

    def __init__(self, config: DbrxConfig, init: Init):
        self.scale = init.ones((config.d_model,), ("replicated",))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return layer_norm(x, self.scale[...])


class Block(nnx.Module):
    """x + attention(norm_1(x)), then x + moe(norm_2(x)), on this device's tokens."""

    def __init__(self, config: DbrxConfig, init: Init):
        self.norm_1 = Norm(config, init)
        self.attention = Attention(config, init)
        self.norm_2 = Norm(config, init)
        self.moe = MoE(config, init)

    def sequence(
        self,
        partition: Partition,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        jitter_key: Array | None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Runs the block on whole sequences; returns hidden states and the routing of all B * T tokens in order."""
        x = x + self.attention(self.norm_1(x), positions, mask, partition)
        y, routing = self.moe(self.norm_2(x), partition, mask, jitter_key)
        return x + y, routing

    def forward_with_cache(
        self,
        partition: Partition,
        x: Float[Array, "P T D"],
        valid: Bool[Array, "R T"],
        positions: Int[Array, "R T"],
        cache: LayerCache,
        table: Int[Array, "R W"],
    ) -> tuple[Float[Array, "P T D"], LayerCache]:
        """Runs the block on new tokens of R rows; returns their hidden states and the updated cache.

        Args:
          x: R rows, then rows of padding.
        """
        y, cache = self.attention.attend(self.norm_1(x), valid, positions, cache, table, partition)
        kernels = self.moe.token_kernels(x, partition) if valid.size == 1 else None
        if kernels is not None:
            y = self.attention.project_out(y, partition)
            return self.moe.decode_token(kernels, x, y, self.norm_2.scale[...], partition, valid), cache
        x = x + self.attention.project_out(y, partition)
        if x.shape[1] == 1:
            return x + self.moe.decode(self.norm_2(x), partition, valid), cache
        y, _ = self.moe(self.norm_2(x), partition, valid)
        return x + y, cache

    def decode_in_row_tiles(
        self,
        partition: Partition,
        x: Float[Array, "R 1 D"],
        valid: Bool[Array, "R"],
        positions: Int[Array, "R"],
        cache: LayerCache,
        table: Int[Array, "R W"],
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], LayerCache]:
        """Runs the block on one new token of each row, in tiles of ROW_TILE rows, but experts on all rows together.

        Args:
          count: number of tiles, as in :func:`map_row_tiles`.
        """

        def attend(_, tile, cache):
            x, valid, positions, table = tile
            inputs = self.norm_1(x), valid[:, None], positions[:, None], cache, table
            y, cache = self.attention.attend(*inputs, partition)
            x = x + self.attention.project_out(y, partition)
            normed = self.norm_2(x)
            routing = self.moe.route(normed, partition)
            if self.moe.dense:
                x = x + self.moe.combine(normed, routing, partition)
            return (x, normed, routing), cache

        (x, normed, routing), cache = map_row_tiles(attend, (x, valid, positions, table), cache, count)
        if not self.moe.dense:
            x = x + self.moe.combine(normed, routing, partition, valid[:, None], ROW_TILE)
        return x, cache


def call_block(method: Callable[..., Any], block: Block, partition: Partition, *arrays: Any) -> Any:
    """Calls a method of a block. Blocks of one shape share one trace and lowering; 40 of them would take seconds."""
    return _call_method(method, *nnx.split(block), partition, *arrays)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _call_method(method, graph, state, partition, *arrays):
    return method(nnx.merge(graph, state), partition, *arrays)
