"""The key-value cache: per layer one array of keys and one of values, (B, G, S, K).

B rows, G key and value heads, S positions, K elements a head. On a TPU they lie as (B, S, G, K): its
compiler would turn the whole cache round before and after each step. On a mesh a device has its rows, its
heads, and every X-th position: position p is at place p // X on device p mod X along STRIPES. So the
devices share the work of attention equally, whatever the length, and long sequences fit. On each
device S is a multiple of CACHE_BLOCK, the unit in which attention reads it.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.config import DbrxConfig
from dbrx_jax.sharding import ROWS, STRIPES, Partition

CACHE_BLOCK = 128  # positions
# Tokens of a prompt that go through the model together, by platform: enough to keep its matrix units busy.
PREFILL_CHUNK = {"cpu": 128, "tpu": 2048, "gpu": 2048, "cuda": 2048}


class LayerCache(NamedTuple):
    key: Float[Array, "B G S K"]
    value: Float[Array, "B G S K"]


Cache = list[LayerCache]


def capacity(tokens: int, partition: Partition) -> int:
    """The cache's length in positions for sequences of up to `tokens`.

    Rounded up to an eighth of the next power of two, so that a conversation that grows is
    compiled for seldom, and at most a quarter of the cache lies idle beyond one chunk.
    """
    unit = math.lcm(chunk_length(partition), CACHE_BLOCK * partition.size(STRIPES))
    step = max(unit, (1 << (tokens - 1).bit_length()) // 8 // unit * unit)
    return -(-tokens // step) * step


def chunk_length(partition: Partition) -> int:
    """Tokens of a prompt that go through the model together: a multiple of what they are split into."""
    tokens, stripes = PREFILL_CHUNK[partition.platform], partition.size(STRIPES)
    return -(-tokens // stripes) * stripes


def specs(config: DbrxConfig, partition: Partition) -> Cache:
    """Where the cache lies on a mesh."""
    axes = ("tensor", STRIPES)
    spec = partition.place(ROWS, *(axes[::-1] if partition.platform == "tpu" else axes), None)
    layer: Any = LayerCache
    return [layer(spec, spec) for _ in range(config.n_layers)]


def turned(cache: LayerCache, platform: str) -> LayerCache:
    """From how a layer's cache lies to (B, G, S, K), and back: on a TPU another view of the same bytes."""
    return LayerCache(*(x.swapaxes(1, 2) for x in cache)) if platform == "tpu" else cache


def create(config: DbrxConfig, rows: int, positions: int, dtype: DTypeLike, partition: Partition) -> Cache:
    """This device's part of an empty cache of `rows` rows and `positions` positions."""
    shape = (
        rows // partition.size(*ROWS),
        config.kv_n_heads // partition.size("tensor"),
        positions // partition.size(STRIPES),
        config.head_dim,
    )
    return [
        turned(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), partition.platform)
        for _ in range(config.n_layers)
    ]


def write(
    cache: LayerCache,
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
    stripe: tuple[Int[Array, ""] | int, int] = (0, 1),
    active: Bool[Array, ""] | bool = True,
) -> LayerCache:
    """The cache with the new keys and values at `positions` of rows first_row … first_row + R.

    The positions must lie within the cache. Several tokens of one row must follow one another, from
    a multiple of the stripes on.

    Args:
      stripe: (x, X): this device has every X-th position from x on.
      active: False leaves the cache as it is.
    """
    offset, stride = stripe
    R, T = positions.shape
    if R == 1 and T > 1:
        start = (first_row, 0, positions[0, 0] // stride, 0)

        def put_chunk(into: Array, new: Array) -> Array:
            mine = lax.dynamic_index_in_dim(new.reshape(1, T // stride, stride, *new.shape[2:]), offset, 2, False)
            mine = mine.transpose(0, 2, 1, 3)  # (1, G, T / X, K)
            if active is not True:
                mine = jnp.where(active, mine, lax.dynamic_slice(into, start, mine.shape))
            return lax.dynamic_update_slice(into, mine, start)

        return LayerCache(put_chunk(cache.key, key), put_chunk(cache.value, value))
    # What is another device's lies behind the end, and is dropped.
    mine = (positions % stride == offset) & active
    rows, place = first_row + jnp.arange(R)[:, None], jnp.where(mine, positions // stride, cache.key.shape[2])

    def put(into: Array, new: Array) -> Array:
        return into.at[rows, :, place].set(new, unique_indices=True, mode="drop")

    return LayerCache(put(cache.key, key), put(cache.value, value))
