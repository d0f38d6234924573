"""The key-value cache: for each layer an array of keys and one of values, (B, G, S, K).

B rows, G key and value heads, S positions, K elements a head. On TPUs the arrays are stored as (B, S, G, K), because
their compiler would transpose the other layout in every step. On a mesh position p is at index p // X on device p mod X
along CONTEXT_AXIS, so that devices share attention equally at any length. On each device S is a multiple of
CACHE_BLOCK. An int8 cache has a bfloat16 scale for the K elements of each position and head, (B, G, S).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int8

from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.cache_layout import is_stored_by_head
from dbrx_jax.kernels.dispatch import cache_write_kernel
from dbrx_jax.sharding.partition import BATCH_AXES, CONTEXT_AXIS, Partition

CACHE_BLOCK = 128  # positions
SCALE_DTYPE = jnp.bfloat16
# Lengths of a prefill chunk, by platform: the least that holds the rest of the prompt is used, else the largest.
# They keep matrix units busy; on a CPU padding costs more, so there are two.
PREFILL_CHUNKS = {"cpu": (128, 512)}
PREFILL_CHUNKS_ELSEWHERE = (2048,)


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    key: Float[Array, "B G S K"] | Int8[Array, "B G S K"]
    value: Float[Array, "B G S K"] | Int8[Array, "B G S K"]
    key_scale: Float[Array, "B G S"] | None = None  # of an int8 cache
    value_scale: Float[Array, "B G S"] | None = None

    @property
    def scales(self) -> tuple[Array, Array] | None:
        """Scales of keys and values; None if the cache is not int8."""
        return None if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)


Cache = list[LayerCache]


def cache_capacity(tokens: int, partition: Partition) -> int:
    """Returns the cache's length in positions for sequences of up to `tokens`.

    It is rounded up to a multiple of an eighth of the next power of two: a conversation that grows is seldom
    compiled for anew, and at most a quarter of the cache is unused beyond one chunk.
    """
    multiple = math.lcm(*prefill_chunk_lengths(partition), CACHE_BLOCK * partition.size(CONTEXT_AXIS))
    step = max(multiple, (1 << (tokens - 1).bit_length()) // 8 // multiple * multiple)
    return -(-tokens // step) * step


def prefill_chunk_lengths(partition: Partition) -> tuple[int, ...]:
    """Returns the possible lengths of a prefill chunk, ascending, rounded up to multiples of CONTEXT_AXIS' size."""
    context_size = partition.size(CONTEXT_AXIS)
    lengths = PREFILL_CHUNKS.get(partition.platform, PREFILL_CHUNKS_ELSEWHERE)
    return tuple(-(-tokens // context_size) * context_size for tokens in lengths)


def prefill_chunks(tokens: int, partition: Partition) -> Iterator[tuple[int, int]]:
    """Yields the first position and padded length of each chunk of a prompt of `tokens` tokens."""
    lengths, start = prefill_chunk_lengths(partition), 0
    while start < tokens:
        length = next((n for n in lengths if n >= tokens - start), lengths[-1])
        yield start, length
        start += length


def cache_specs(config: DbrxConfig, partition: Partition, int8: bool = False) -> Cache:
    """Returns the partition specs of the cache."""
    axes = (CONTEXT_AXIS, "tensor") if partition.platform == "tpu" else ("tensor", CONTEXT_AXIS)
    spec, scale = partition.array_spec(BATCH_AXES, *axes, None), partition.array_spec(BATCH_AXES, *axes)
    specs: list[Any] = [spec, spec, scale, scale] if int8 else [spec, spec]
    return [LayerCache(*specs)] * config.n_layers


def swap_layout(cache: LayerCache, platform: str) -> LayerCache:
    """Transposes a layer's cache between its stored layout and (B, G, S, K); a view of the same bytes on a TPU."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), cache) if platform == "tpu" else cache


def create_cache(config: DbrxConfig, rows: int, positions: int, dtype: DTypeLike, partition: Partition) -> Cache:
    """Creates this device's shard of an empty cache of `rows` rows and `positions` positions."""
    local_rows, local_positions = rows // partition.size(*BATCH_AXES), positions // partition.size(CONTEXT_AXIS)
    shape = (local_rows, config.kv_n_heads // partition.size("tensor"), local_positions, config.head_dim)

    def layer() -> LayerCache:
        scales = [jnp.zeros(shape[:3], SCALE_DTYPE) for _ in range(2)] if dtype == jnp.int8 else []
        return swap_layout(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales), partition.platform)

    return [layer() for _ in range(config.n_layers)]


def quantize_to_int8(x: Float[Array, "R T G K"]) -> tuple[Int8[Array, "R T G K"], Float[Array, "R T G"]]:
    """Returns integers from -127 to 127, and the scale of each position and head."""
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), axis=-1) / 127).astype(SCALE_DTYPE)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    return jnp.clip(jnp.round(x / divisor), -127, 127).astype(jnp.int8), scale


def write_cache(
    cache: LayerCache,
    key: Float[Array, "R T G K"],
    value: Float[Array, "R T G K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    active: Bool[Array, ""] | bool = True,
    platform: str = "cpu",
) -> LayerCache:
    """Writes new keys and values at `positions` of rows first_row … first_row + R; returns the updated cache.

    The positions must be within the cache. Several tokens of one row must be consecutive, from a multiple of X on.

    Args:
      context_shard: (x, X): this device has every X-th position from x on.
      active: False leaves the cache as it is.
    """
    shard, num_shards = context_shard
    R, T = positions.shape
    new = LayerCache(key, value)
    if cache.key_scale is not None:
        (key, key_scale), (value, value_scale) = quantize_to_int8(key), quantize_to_int8(value)
        new = LayerCache(key, value, key_scale, value_scale)
    if R == 1 and T > 1:

        def write_chunk(stored: Array, new: Array) -> Array:
            start = (first_row, 0, positions[0, 0] // num_shards, 0)[: new.ndim]
            shards = new.reshape(1, T // num_shards, num_shards, *new.shape[2:])
            local = lax.dynamic_index_in_dim(shards, shard, 2, False).swapaxes(1, 2)  # (1, G, T / X, K)
            if active is not True:
                local = jnp.where(active, local, lax.dynamic_slice(stored, start, local.shape))
            return lax.dynamic_update_slice(stored, local, start)

        return jax.tree.map(write_chunk, cache, new)
    # Positions of other devices are mapped past the end, where a scatter drops them.
    is_local = (positions % num_shards == shard) & active
    rows, indices = first_row + jnp.arange(R)[:, None], jnp.where(is_local, positions // num_shards, cache.key.shape[2])

    heads = cache.key.shape[1]
    by_head = platform == "tpu" and is_stored_by_head(heads, cache.key.dtype)
    kernel = cache_write_kernel(platform) if T == 1 and not by_head else None

    def write(stored: Array, new: Array) -> Array:
        if by_head:  # to scatter all heads of a position at once, XLA would transpose the whole cache
            index = (rows[..., None], jnp.arange(heads), indices[..., None])
            return stored.at[index].set(new, unique_indices=True, mode="drop")
        if kernel is not None and stored.ndim == 4:
            new = new[:, 0].astype(stored.dtype)
            return kernel(stored.swapaxes(1, 2), new, rows[:, 0], indices[:, 0]).swapaxes(1, 2)
        return stored.at[rows, :, indices].set(new, unique_indices=True, mode="drop")

    return jax.tree.map(write, cache, new)
