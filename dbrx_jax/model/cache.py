"""The paged key-value cache: for each layer a pool of blocks of keys and one of values, (N, G, P, K).

N blocks, G key and value heads, P = CACHE_BLOCK positions, K elements a head. A table (R, W) has the numbers of each
row's blocks in order: position p of row r is in block table[r, p // P] at p % P. Block 0 is spare: it stays zero, and
is the entry of a table where a row has no block. On a mesh position p is local position p // X on device p mod X along
CONTEXT_AXIS, so that devices share attention equally at any length; a block then holds P X positions.

On TPUs the arrays are stored as (N, P, G, K), because their compiler would transpose the other layout in every step. An
int8 cache has a bfloat16 scale for the K elements of each position and head, (N, G, P).
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int8

from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.cache_layout import is_stored_by_head
from dbrx_jax.kernels.dispatch import cache_write_kernels
from dbrx_jax.sharding.partition import BATCH_AXES, CONTEXT_AXIS, Partition

CACHE_BLOCK = 128  # positions
SCALE_DTYPE = jnp.bfloat16
MIN_CHUNK = 16  # tokens of the shortest chunk; fewer tokens of a row may be at any position
# Lengths of a prefill chunk on CPUs and on accelerators, each a multiple of the one before.
CPU_CHUNKS = (16, 32, 64, 128, 512)
ACCELERATOR_CHUNKS = (32, 128, 512, 2048)
# A chunk of fewer tokens is counted as one of so many: it reads the same weights. On a CPU this is roughly what was
# measured, with the demo and with a model of 1.6 GB (docs/cpu.md). On accelerators it lies between the 140 tokens that
# an H100 takes to read int4 weights (measured) and the 400 to 2000 of bfloat16 rooflines.
CPU_LEAST_COST = 64
ACCELERATOR_LEAST_COST = 256


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    key: Float[Array, "N G P K"] | Int8[Array, "N G P K"]
    value: Float[Array, "N G P K"] | Int8[Array, "N G P K"]
    key_scale: Float[Array, "N G P"] | None = None  # of an int8 cache
    value_scale: Float[Array, "N G P"] | None = None

    @property
    def scales(self) -> tuple[Array, Array] | None:
        """Scales of keys and values; None if the cache is not int8."""
        return None if self.key_scale is None or self.value_scale is None else (self.key_scale, self.value_scale)


Cache = list[LayerCache]


def block_positions(partition: Partition) -> int:
    """Returns the positions of a block over all devices."""
    return CACHE_BLOCK * partition.size(CONTEXT_AXIS)


def cache_capacity(tokens: int, partition: Partition) -> int:
    """Returns the cache's length in positions for sequences of up to `tokens`.

    It is one of few: the longest chunk times 1, 2, 3, 4, 6, 8, 12 and so on, so that programs are seldom compiled anew,
    and at most a third of the cache is unused beyond one chunk.
    """
    unit = math.lcm(prefill_chunk_lengths(partition)[-1], block_positions(partition))
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


def prefill_chunks(tokens: int, partition: Partition, longest: int | None = None) -> list[tuple[int, int]]:
    """Returns the first position and padded length of each chunk of a prompt of `tokens` tokens.

    They depend on the prompt's length alone, and on the longest length that a chunk may have. Among all ways to cover
    it with chunks of descending lengths, this is the one that takes least time.
    """
    lengths = tuple(n for n in prefill_chunk_lengths(partition) if longest is None or n <= longest)
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
    """Returns the partition specs of the cache: each group of rows has a pool of its own."""
    axes = (CONTEXT_AXIS, "tensor") if partition.platform == "tpu" else ("tensor", CONTEXT_AXIS)
    spec, scale = partition.array_spec(BATCH_AXES, *axes, None), partition.array_spec(BATCH_AXES, *axes)
    specs: list[Any] = [spec, spec, scale, scale] if int8 else [spec, spec]
    return [LayerCache(*specs)] * config.n_layers


def swap_layout(cache: LayerCache, platform: str) -> LayerCache:
    """Transposes a layer's cache between its stored layout and (N, G, P, K); a view of the same bytes on a TPU."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2), cache) if platform == "tpu" else cache


def stored_dtype(dtype: DTypeLike, platform: str) -> np.dtype:
    """Returns the dtype of the arrays of a cache.

    On CPUs bfloat16 is stored as uint16: XLA would convert a whole pool to float32 to read or write a block of it.
    """
    return np.dtype(np.uint16 if platform == "cpu" and dtype == jnp.bfloat16 else dtype)


def create_cache(config: DbrxConfig, blocks: int, dtype: DTypeLike, partition: Partition) -> Cache:
    """Creates this device's shard of an empty cache of `blocks` blocks for each group of rows."""
    shape = (blocks, config.kv_n_heads // partition.size("tensor"), CACHE_BLOCK, config.head_dim)
    stored, scale = (stored_dtype(d, partition.platform) for d in (dtype, SCALE_DTYPE))

    def layer() -> LayerCache:
        scales = [jnp.zeros(shape[:3], scale) for _ in range(2)] if dtype == jnp.int8 else []
        return swap_layout(LayerCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored), *scales), partition.platform)

    return [layer() for _ in range(config.n_layers)]


def copy_block(cache: Cache, source: Int[Array, ""], target: Int[Array, ""]) -> Cache:
    """Copies one block of every layer to another, on this device."""

    def copy(pool: Array) -> Array:
        block = lax.dynamic_index_in_dim(pool, source, keepdims=True)
        return lax.dynamic_update_slice_in_dim(pool, block, target, 0)

    return jax.tree.map(copy, cache)


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
    valid: Bool[Array, "R T"],
    positions: Int[Array, "R T"],
    table: Int[Array, "R W"],
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    platform: str = "cpu",
) -> LayerCache:
    """Writes new keys and values at `positions` of rows with these tables of blocks; returns the updated cache.

    A chunk of at least MIN_CHUNK tokens of a row must be consecutive, from a multiple of its length, or of a block's,
    on. The valid tokens come first in it.

    Args:
      valid: False for padding, which changes nothing that is read later.
      context_shard: (x, X): this device has every X-th position from x on.
    """
    key, value = (jnp.where(valid[..., None, None], x, 0) for x in (key, value))
    new = LayerCache(key, value)
    if cache.key_scale is not None:
        (key, key_scale), (value, value_scale) = quantize_to_int8(key), quantize_to_int8(value)
        new = LayerCache(key, value, key_scale, value_scale)
    new = jax.tree.map(_as_stored, new, cache)
    write = _write_tokens if positions.shape[1] < MIN_CHUNK else _write_chunk
    return write(cache, new, valid, positions, table, context_shard, platform)


def _as_stored(new: Array, stored: Array) -> Array:
    """Converts new elements to the dtype of a cache's array."""
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
    return new.astype(stored.dtype)


def _write_chunk(cache, new, valid, positions, table, context_shard, platform):
    """Writes consecutive tokens in pieces of one block each; pieces of padding go to the spare block, as zeros.

    The loop carries the stored layout: around a loop over another view of it, XLA for TPUs copies the whole pools.
    """
    shard, num_shards = context_shard
    R, T = positions.shape
    local_tokens, block_size = T // num_shards, cache.key.shape[2]
    size = math.gcd(local_tokens, block_size)
    pieces = local_tokens // size

    def write(i: Array, cache: LayerCache) -> LayerCache:
        row, piece = i // pieces, i % pieces
        first = positions[row, 0] // num_shards + piece * size
        is_used = valid[row, piece * size * num_shards]
        block = jnp.where(is_used, table[row, jnp.minimum(first // block_size, table.shape[1] - 1)], 0)

        def put(pool: Array, new: Array) -> Array:
            rest = new.shape[2:]
            shards = new.reshape(R, pieces, size, num_shards, *rest)
            start = (row, piece, 0, shard, *[0] * len(rest))
            local = lax.dynamic_slice(shards, start, (1, 1, size, 1, *rest)).reshape(1, size, *rest)
            if platform == "tpu":
                return lax.dynamic_update_slice(pool, local, (block, first % block_size, 0, 0)[: pool.ndim])
            return lax.dynamic_update_slice(pool, local.swapaxes(1, 2), (block, 0, first % block_size, 0)[: pool.ndim])

        return jax.tree.map(put, cache, new)

    return swap_layout(lax.fori_loop(0, R * pieces, write, swap_layout(cache, platform)), platform)


def _write_tokens(cache, new, valid, positions, table, context_shard, platform):
    """Writes tokens at any positions, each on its own."""
    shard, num_shards = context_shard
    is_local = (positions % num_shards == shard) & valid
    local, block_size = positions // num_shards, cache.key.shape[2]
    blocks = jnp.take_along_axis(table, jnp.minimum(local // block_size, table.shape[1] - 1), axis=1)
    # What is not written here is mapped past the end of a block, where a scatter drops it.
    offsets = jnp.where(is_local, local % block_size, block_size)
    heads = cache.key.shape[1]
    by_head = platform == "tpu" and is_stored_by_head(heads, cache.key.dtype)
    kernels = cache_write_kernels(platform)

    def write(pool: Array, new: Array) -> Array:
        if kernels is not None and pool.ndim == 3 and positions.shape[1] == 1:
            return kernels.write_scales(pool, new[:, 0], blocks[:, 0], offsets[:, 0])
        if by_head:  # to scatter all heads of a position at once, XLA would transpose the whole cache
            index = (blocks[..., None], jnp.arange(heads), offsets[..., None])
            return pool.at[index].set(new, unique_indices=True, mode="drop")
        if kernels is not None and pool.ndim == 4:
            rows = new.reshape(-1, *new.shape[2:])
            stored = kernels.write_positions(pool.swapaxes(1, 2), rows, blocks.reshape(-1), offsets.reshape(-1))
            return stored.swapaxes(1, 2)
        return pool.at[blocks, :, offsets].set(new, unique_indices=True, mode="drop")

    return jax.tree.map(write, cache, new)
