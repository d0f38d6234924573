"""The key-value cache: per layer one array of keys and one of values, (B, G, S, K).

B rows, G key and value heads, S positions, K elements a head. S is a multiple of CACHE_BLOCK, the
unit in which attention reads it, and of PREFILL_CHUNK, the unit in which prompts are written.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from dbrx_jax.config import DbrxConfig

CACHE_BLOCK = 128  # positions
PREFILL_CHUNK = 128  # tokens; a multiple of CACHE_BLOCK


class LayerCache(NamedTuple):
    key: Float[Array, "B G S K"]
    value: Float[Array, "B G S K"]


Cache = list[LayerCache]


def capacity(tokens: int) -> int:
    """The cache's length in positions for sequences of up to `tokens`.

    Rounded up to an eighth of the next power of two, so that a conversation that grows is
    compiled for seldom, and at most a quarter of the cache lies idle beyond one chunk.
    """
    step = max(PREFILL_CHUNK, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


def create(config: DbrxConfig, rows: int, positions: int, dtype: DTypeLike) -> Cache:
    """An empty cache of `rows` rows and `positions` positions."""
    shape = (rows, config.kv_n_heads, positions, config.head_dim)
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)]


def write(
    cache: LayerCache,
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
) -> LayerCache:
    """The cache with the new keys and values at `positions` of rows first_row … first_row + R.

    The positions must lie within the cache.
    """
    rows = first_row + jnp.arange(key.shape[0])[:, None]

    def put(into: Array, new: Array) -> Array:
        return into.at[rows, :, positions].set(new, unique_indices=True, mode="promise_in_bounds")

    return LayerCache(put(cache.key, key), put(cache.value, value))
