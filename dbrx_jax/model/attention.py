"""The attention of one block."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.cache import CACHE_BLOCK, LayerCache, write
from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.attention import cached_attention, reference_attention
from dbrx_jax.ops.rope import rotate


class Attention(nnx.Module):
    """Grouped-query attention with H query heads, G key and value heads and K elements a head."""

    def __init__(self, config: DbrxConfig, init: Init):
        H, G, K, D = config.n_heads, config.kv_n_heads, config.head_dim, config.d_model
        std = config.initializer_range
        self.query = init.normal((H, K, D), ("heads", "head_dim", "embed"), std)
        self.key = init.normal((G, K, D), ("kv_heads", "head_dim", "embed"), std)
        self.value = init.normal((G, K, D), ("kv_heads", "head_dim", "embed"), std)
        self.out = init.normal((D, H, K), ("embed", "heads", "head_dim"), std)
        self.clip = config.clip_qkv
        self.theta = config.rope_theta

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Bool[Array, "B T T"]) -> Array:
        """Attention among x's own tokens, (B, T, D)."""
        return self._project_out(reference_attention(*self._project_in(x, positions), mask))

    def extend(
        self, x: Float[Array, "R T D"], positions: Int[Array, "R T"], cache: LayerCache, first_row: Int[Array, ""] | int
    ) -> tuple[Float[Array, "R T D"], LayerCache]:
        """Attention of new tokens to themselves and to what the cache holds, and the cache with them in it."""
        q, k, v = self._project_in(x, positions)
        cache = write(cache, k, v, positions, first_row)
        out = cached_attention(q, cache.key, cache.value, positions, first_row, CACHE_BLOCK)
        return self._project_out(out), cache

    def _project_in(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Query, key and value (B, T, heads, K): clamped first, values too, then rotated."""
        q, k, v = (jnp.einsum("btd,hkd->bthk", x, w[...]) for w in (self.query, self.key, self.value))
        if self.clip is not None:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        return rotate(q, positions, self.theta), rotate(k, positions, self.theta), v

    def _project_out(self, y: Array) -> Array:
        return jnp.einsum("bthk,dhk->btd", y, self.out[...])
