"""Grouped-query attention of one block, on whole sequences or with a key-value cache."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.attention import cached_attention, select_implementation, sequence_attention, write_and_attend
from dbrx_jax.kernels.linear import linear, linears
from dbrx_jax.model.cache import LayerCache, swap_layout, write_cache
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.attention import merge_partial_attention
from dbrx_jax.ops.linear import matrix
from dbrx_jax.ops.rope import rotate
from dbrx_jax.ops.row_tiles import pad_rows
from dbrx_jax.sharding.partition import CONTEXT_AXIS, Partition


class Attention(nnx.Module):
    """Grouped-query attention with H query heads, G key and value heads and K elements a head.

    On a mesh each device has its heads along `tensor`, and along `expert` a part of every weight's
    embedding dimension: it computes partial sums for all tokens, which are then reduced.
    """

    def __init__(self, config: DbrxConfig, init: Init):
        H, G, K, D = config.n_heads, config.kv_n_heads, config.head_dim, config.d_model
        std = config.initializer_range
        self.query = init.normal((H, K, D), ("heads", "head_dim", "embed"), std, "attention")
        self.key = init.normal((G, K, D), ("kv_heads", "head_dim", "embed"), std, "attention")
        self.value = init.normal((G, K, D), ("kv_heads", "head_dim", "embed"), std, "attention")
        self.out = init.normal((D, H, K), ("embed", "heads", "head_dim"), std, "attention", contracted=(-2, -1))
        self.clip = config.clip_qkv
        self.theta = config.rope_theta

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Bool[Array, "B T"], partition: Partition
    ) -> Array:
        """Returns the attention among the tokens of whole sequences.

        Args:
          x: (B, T, D), or on a mesh this device's tokens of it, as is the result.
          mask: of all tokens; False for padding.
        """
        q, k, v = self._rotated(self._project_in(partition.gather_tokens(x), partition), positions)
        q = partition.local_tokens(q)
        first = partition.axis_index("expert") * q.shape[1] if partition.tokens_split else 0
        implementation = select_implementation(partition.attention, partition.platform)
        y = sequence_attention(q, k, v, mask, first, implementation, partition.platform)
        return self.project_out(partition.gather_tokens(y), partition)

    def attend(
        self,
        x: Float[Array, "P T D"],
        valid: Bool[Array, "R T"],
        positions: Int[Array, "R T"],
        cache: LayerCache,
        table: Int[Array, "R W"],
        partition: Partition,
    ) -> tuple[Float[Array, "P T H K"], LayerCache]:
        """Returns the attention of new tokens to themselves and the cache, and the updated cache.

        :meth:`project_out` completes the layer.

        Args:
          x: R rows, then rows of padding, which get finite but arbitrary results.
          valid: False for padding.
          table: the blocks of each row.
        """
        projected = self._project_in(partition.gather_tokens(x), partition)
        q, k, v = self._rotated([y[: len(positions)] for y in projected], positions)
        platform = partition.platform
        implementation = select_implementation(partition.attention, platform)
        context_shard = partition.axis_index(CONTEXT_AXIS), partition.size(CONTEXT_AXIS)
        cache, fused = swap_layout(cache, platform), None
        if context_shard[1] == 1:
            arguments = q, k, v, cache.key, cache.value, positions, valid, table
            fused = write_and_attend(*arguments, platform, implementation)
        if fused is not None:
            partial, key, value = fused
            cache = LayerCache(key, value)
        else:
            cache = write_cache(cache, k, v, valid, positions, table, context_shard, platform)
            partial = cached_attention(
                q, cache.key, cache.value, positions, table, context_shard, platform, cache.scales, implementation
            )
        y = merge_partial_attention(partial, x.dtype, partition)
        return pad_rows(y, len(x)), swap_layout(cache, platform)

    def _project_in(self, x: Array, partition: Partition) -> list[Array]:
        """Returns query, key and value (B, T, heads, K) of all tokens."""
        x = partition.local_shard(x, 2, "expert")
        weights = [partition.gather_fsdp(w) for w in (self.query, self.key, self.value)]
        rows = x.reshape(-1, x.shape[-1])
        products = linears(rows, [matrix(w, 2) for w in weights], 1, partition.platform)
        qkv = [y.reshape(*x.shape[:2], *w.shape[:2]) for y, w in zip(products, weights, strict=True)]
        if partition.size("expert") > 1:
            H, G, _ = (w.shape[0] for w in weights)
            reduced = partition.psum(jnp.concatenate(qkv, axis=2), "expert")
            return jnp.split(reduced, [H, H + G], axis=2)
        return qkv

    def _rotated(self, qkv: list[Array], positions: Array) -> tuple[Array, Array, Array]:
        """Returns clipped query, key and value; query and key are rotated too (RoPE)."""
        q, k, v = qkv
        if self.clip is not None:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        return rotate(q, positions, self.theta), rotate(k, positions, self.theta), v

    def project_out(self, y: Float[Array, "B T H K"], partition: Partition) -> Float[Array, "B T D"]:
        """Applies the output projection to this device's heads."""
        weight, rows = partition.gather_fsdp(self.out), y.reshape(-1, math.prod(y.shape[2:]))
        out = linear(rows, matrix(weight, 1), 1, partition.platform).reshape(*y.shape[:2], -1)
        return partition.scatter_tokens(partition.psum(out, "tensor"))
