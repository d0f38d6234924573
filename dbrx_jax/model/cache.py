"""The key-value cache: for each layer an array of keys and one of values, (B, G, S, K).

B rows, G key and value heads, S positions, K elements a head; on TPUs stored as (B, S, G, K), which their compiler
would otherwise transpose in every step. On a mesh position p is at index p // X on device p mod X along CONTEXT_AXIS,
so that devices share attention equally at any length. On each device S is a multiple of CACHE_BLOCK. An int8 cache
has a bfloat16 scale for the K elements of each position and head, (B, G, S).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int8

from dbrx_jax.backend import kernel_backend
from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.cache_layout import is_stored_by_head
from dbrx_jax.sharding.partition import BATCH_AXES, CONTEXT_AXIS, Partition

CACHE_BLOCK = 128  # positions
SCALE_DTYPE = jnp.bfloat16
# Tokens of a prompt that go through the model together, by platform: the least of these numbers that takes the rest
# of the prompt, else the largest. Enough to keep matrix units busy; on a CPU, where padding costs, two.
PREFILL_CHUNKS = {"cpu": (128, 512)}
PREFILL_CHUNKS_ELSEWHERE = (2048,)


class LayerCache(NamedTuple):
    key: Float[Array, "B G S K"] | Int8[Array, "B G S K"]
    value: Float[Array, "B G S K"] | Int8[Array, "B G S K"]
    key_scale: Float[Array, "B G S"] | None = None  # of an int8 cache
    value_scale: Float[Array, "B G S"] | None = None

    @property
    def scales(self) -> tuple[Array, Array] | None:
        """Scales of keys and of values, or None where the cache is not int8."""
        return None if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)


Cache = list[LayerCache]


def cache_capacity(tokens: int, partition: Partition) -> int:
    """The cache's length in positions for sequences of up to `tokens`.

    Rounded up to an eighth of the next power of two, so that a conversation that grows is
    compiled for seldom, and at most a quarter of the cache is unused beyond one chunk.
    """
    unit = math.lcm(*prefill_chunk_lengths(partition), CACHE_BLOCK * partition.size(CONTEXT_AXIS))
    step = max(unit, (1 << (tokens - 1).bit_length()) // 8 // unit * unit)
    return -(-tokens // step) * step


def prefill_chunk_lengths(partition: Partition) -> tuple[int, ...]:
    """Numbers of tokens that a chunk of a prompt can have, ascending: multiples of what they are split into."""
    context_size = partition.size(CONTEXT_AXIS)
    lengths = PREFILL_CHUNKS.get(partition.platform, PREFILL_CHUNKS_ELSEWHERE)
    return tuple(-(-tokens // context_size) * context_size for tokens in lengths)


def prefill_chunks(tokens: int, partition: Partition) -> Iterator[tuple[int, int]]:
    """First position and padded length of each prefill chunk, from the length of the prompt alone."""
    lengths, start = prefill_chunk_lengths(partition), 0
    while start < tokens:
        length = next((n for n in lengths if n >= tokens - start), lengths[-1])
        yield start, length
        start += length


def cache_specs(config: DbrxConfig, partition: Partition, int8: bool = False) -> Cache:
    """Partition specs of the cache."""
    axes = ("tensor", CONTEXT_AXIS)
    axes = axes[::-1] if partition.platform == "tpu" else axes
    spec, scale = partition.array_spec(BATCH_AXES, *axes, None), partition.array_spec(BATCH_AXES, *axes)
    layer: Any = LayerCache
    return [layer(spec, spec, *([scale, scale] if int8 else [])) for _ in range(config.n_layers)]


def swap_layout(cache: LayerCache, platform: str) -> LayerCache:
    """Transposes a layer's cache between its stored layout and (B, G, S, K); a view of the same bytes on a TPU."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), cache) if platform == "tpu" else cache


def create_cache(config: DbrxConfig, rows: int, positions: int, dtype: DTypeLike, partition: Partition) -> Cache:
    """This device's part of an empty cache of `rows` rows and `positions` positions."""
    shape = (
        rows // partition.size(*BATCH_AXES),
        config.kv_n_heads // partition.size("tensor"),
        positions // partition.size(CONTEXT_AXIS),
        config.head_dim,
    )

    def layer() -> LayerCache:
        scales = [jnp.zeros(shape[:3], SCALE_DTYPE) for _ in range(2)] if dtype == jnp.int8 else []
        return swap_layout(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales), partition.platform)

    return [layer() for _ in range(config.n_layers)]


def quantize_to_int8(x: Float[Array, "R T G K"]) -> tuple[Int8[Array, "R T G K"], Float[Array, "R T G"]]:
    """Whole numbers from -127 to 127, and the scales that they are to be multiplied with."""
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), axis=-1) / 127).astype(SCALE_DTYPE)
    unit = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    return jnp.clip(jnp.round(x / unit), -127, 127).astype(jnp.int8), scale


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
    """The cache with the new keys and values at `positions` of rows first_row … first_row + R.

    The positions must be within the cache. Several tokens of one row must follow one another, from
    a multiple of the context_size on.

    Args:
      context_shard: (x, X): this device has every X-th position from x on.
      active: False leaves the cache as it is.
    """
    offset, stride = context_shard
    R, T = positions.shape
    new = LayerCache(key, value)
    if cache.key_scale is not None:
        (key, key_scale), (value, value_scale) = quantize_to_int8(key), quantize_to_int8(value)
        new = LayerCache(key, value, key_scale, value_scale)
    if R == 1 and T > 1:

        def put_chunk(into: Array, new: Array) -> Array:
            start = (first_row, 0, positions[0, 0] // stride, 0)[: new.ndim]
            mine = lax.dynamic_index_in_dim(new.reshape(1, T // stride, stride, *new.shape[2:]), offset, 2, False)
            mine = mine.swapaxes(1, 2)  # (1, G, T / X, K)
            if active is not True:
                mine = jnp.where(active, mine, lax.dynamic_slice(into, start, mine.shape))
            return lax.dynamic_update_slice(into, mine, start)

        return jax.tree.map(put_chunk, cache, new)
    # Positions of other devices map past the end and are dropped.
    mine = (positions % stride == offset) & active
    rows, place = first_row + jnp.arange(R)[:, None], jnp.where(mine, positions // stride, cache.key.shape[2])

    heads = cache.key.shape[1]
    by_head = platform == "tpu" and is_stored_by_head(heads, cache.key.dtype)
    by_kernel = platform == "tpu" and T == 1 and kernel_backend(platform) is not None

    def put(into: Array, new: Array) -> Array:
        if by_head:  # a scatter of all heads of a position at once would have the whole cache swap_layout
            where = (rows[..., None], jnp.arange(heads), place[..., None])
            return into.at[where].set(new, unique_indices=True, mode="drop")
        if by_kernel and into.ndim == 4:
            from dbrx_jax.kernels.tpu.cache_write import write_positions  # takes seconds to import

            new = new[:, 0].astype(into.dtype)
            return write_positions(into.swapaxes(1, 2), new, rows[:, 0], place[:, 0]).swapaxes(1, 2)
        return into.at[rows, :, place].set(new, unique_indices=True, mode="drop")

    return jax.tree.map(put, cache, new)
