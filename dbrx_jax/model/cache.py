"""The key-value cache: for each layer an array of keys and one of values, (B, G, S, K).

B rows, G key and value heads, S positions, K elements a head. On TPUs the arrays are stored as (B, S, G, K), because
their compiler would transpose the other layout in every step. On a mesh position p is at index p // X on device p mod X
along CONTEXT_AXIS, so that devices share attention equally at any length. On each device S is a multiple of
CACHE_BLOCK. An int8 cache has a bfloat16 scale for the K elements of each position and head, (B, G, S).
"""

import functools
import itertools
import math
from collections.abc import Callable
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
# Lengths of a prefill chunk on CPUs and on accelerators, each a multiple of the one before.
CPU_CHUNKS = (16, 128, 512)
ACCELERATOR_CHUNKS = (32, 128, 512, 2048)
# A chunk of fewer tokens takes as long as one of so many: it reads the same weights. On a CPU this is measured, with
# the demo and with a model of 0.5 GB. On accelerators it lies between the 140 tokens that an H100 takes to read int4
# weights (measured) and the 400 to 2000 of bfloat16 rooflines.
CPU_LEAST_COST = 64
ACCELERATOR_LEAST_COST = 256


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

    It is one of few: the longest chunk times 1, 2, 3, 4, 6, 8, 12 and so on, so that programs are seldom compiled anew,
    and at most a third of the cache is unused beyond one chunk.
    """
    unit = math.lcm(prefill_chunk_lengths(partition)[-1], CACHE_BLOCK * partition.size(CONTEXT_AXIS))
    return unit * round_up_size(-(-tokens // unit))


def round_up_size(number: int) -> int:
    """Returns the least of 1, 2, 3, 4, 6, 8, 12, 16, … that is not below a number."""
    power = 1 << (number - 1).bit_length()
    return power // 4 * 3 if power >= 4 and power // 4 * 3 >= number else power


def prefill_chunk_lengths(partition: Partition) -> tuple[int, ...]:
    """Returns the possible lengths of a prefill chunk, ascending; all are multiples of CONTEXT_AXIS' size."""
    lengths = CPU_CHUNKS if partition.platform == "cpu" else ACCELERATOR_CHUNKS
    context_size = partition.size(CONTEXT_AXIS)
    shortest = -(-lengths[0] // context_size) * context_size
    return tuple(shortest * (length // lengths[0]) for length in lengths)


def prefill_chunks(tokens: int, partition: Partition) -> list[tuple[int, int]]:
    """Returns the first position and padded length of each chunk of a prompt of `tokens` tokens.

    They depend on the prompt's length alone. Among all ways to cover it with chunks of descending lengths, this is the
    one that takes least time.
    """
    lengths = prefill_chunk_lengths(partition)
    least_cost = CPU_LEAST_COST if partition.platform == "cpu" else ACCELERATOR_LEAST_COST
    num_longest, rest = divmod(tokens, lengths[-1])
    sizes = [*[lengths[-1]] * num_longest, *_cheapest_cover(rest, lengths, least_cost)[1]]
    return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))


@functools.cache
def _cheapest_cover(tokens: int, lengths: tuple[int, ...], least_cost: int) -> tuple[int, tuple[int, ...]]:
    """Returns the cost and the lengths, in descending order, of the cheapest chunks that hold a number of tokens."""
    if tokens == 0:
        return 0, ()
    *shorter, longest = lengths
    num, rest = divmod(tokens, longest)
    padded = (num + (rest > 0)) * max(longest, least_cost), (longest,) * (num + (rest > 0))
    if not shorter or not rest:
        return padded
    cost, chunks = _cheapest_cover(rest, tuple(shorter), least_cost)
    exact = num * max(longest, least_cost) + cost, (longest,) * num + chunks
    return min(exact, padded, key=lambda cover: (cover[0], len(cover[1])))


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


def copy_positions(
    source: Cache,
    target: Cache,
    row: Int[Array, ""],
    start: Int[Array, ""],
    length: int,
    active: Bool[Array, ""],
    partition: Partition,
) -> Cache:
    """Copies positions start … start + length of a cache of one row to a row of another, on this device.

    Args:
      start, length: multiples of CONTEXT_AXIS' size.
      active: False leaves the target as it is; only looked at if there are several groups of rows.
    """
    axis, context_size = 1 if partition.platform == "tpu" else 2, partition.size(CONTEXT_AXIS)
    first = start // context_size

    def copy(target: Array, source: Array) -> Array:
        piece = lax.dynamic_slice_in_dim(source, first, length // context_size, axis)
        index = [row if i == 0 else first if i == axis else 0 for i in range(target.ndim)]
        if partition.size(*BATCH_AXES) > 1:
            piece = jnp.where(active, piece, lax.dynamic_slice(target, index, piece.shape))
        return lax.dynamic_update_slice(target, piece, index)

    return _map_in_place(copy, partition.platform, target, source)


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

        return _map_in_place(write_chunk, platform, cache, new)
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

    return _map_in_place(write, platform, cache, new)


def _map_in_place(update: Callable[[Array, Array], Array], platform: str, cache: Any, new: Any) -> Any:
    """Maps a function that writes the new elements of each array into the cache's.

    On CPUs it gets bfloat16 as integers: XLA of JAX 0.10 would convert the whole array to float32 and back.
    """

    def as_integers(array: Array) -> Array:
        return lax.bitcast_convert_type(array, jnp.uint16)

    def run(stored: Array, new: Array) -> Array:
        if platform != "cpu" or stored.dtype != jnp.bfloat16:
            return update(stored, new)
        return lax.bitcast_convert_type(
            update(as_integers(stored), as_integers(new.astype(stored.dtype))), stored.dtype
        )

    return jax.tree.map(run, cache, new)
