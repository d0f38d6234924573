"""Kernel of the grouped matmul on Hopper GPUs: many rows sorted by group, each times its group's weight.

A thread block computes tiles of rows times channels with three warpgroups. One copies tiles of weights and of
activations to shared memory some steps ahead. Each of the other two has half of the channels. It loads its packed
weights to registers, unpacks them to bfloat16 there and multiplies them with all rows of the tile by wgmma. So a
weight is unpacked once for all of these rows, while the matrix unit multiplies for the other warpgroup. Group scales
are multiplied onto the unpacked weights, so that one accumulator sums the whole contraction. Plain weights are
multiplied from shared memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu.grouped_unpack import unpack, unpack_registers
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, split_activations, split_scales


class GroupedTiles(NamedTuple):
    """Tile sizes of the kernel.

    Attributes:
      rows: activation rows per thread block, a multiple of 8 and at most 256.
      channels: packed elements of output channels per thread block: 64, or a multiple of 128.
      depth: packed elements along the contraction in a tile: 64 (rows of 128 bytes, the widest of wgmma) or 32.
      weight_slots: tiles of packed weights in shared memory.
      row_slots: tiles of activations in shared memory; a tile of int4 weights is multiplied with several.
      band: row tiles that pass over all channels together, so that weights are read from the L2 cache.
    """

    rows: int
    channels: int
    depth: int
    weight_slots: int
    row_slots: int
    band: int = 8

    @property
    def computing(self) -> int:
        """Number of warpgroups that multiply; one more copies."""
        return min(2, self.channels // _M)


_M = 64  # channels of a wgmma


SHARED_BYTES = 226 * 1024  # per thread block: 227 KiB less some for barriers


def is_valid(weight: PackedWeights, t: GroupedTiles) -> bool:
    """Returns whether tiles divide a weight, and fit the shared memory and the registers."""
    divides = weight.channels % t.channels == 0 and weight.depth % t.depth == 0 and t.depth % weight.period == 0
    slots = t.weight_slots * t.channels + t.row_slots * t.rows
    shared_bytes = 2 * t.depth * slots + 2 * weight.num_outputs * t.computing * _M * t.rows
    sums = t.rows * t.channels * weight.num_outputs // t.computing
    is_16_bit = weight.bits.dtype.itemsize == 2
    return is_16_bit and divides and shared_bytes <= SHARED_BYTES and sums <= 64 * 256


class RowTiles(NamedTuple):
    """Row tiles, each within one group, arrays (L,).

    Attributes:
      first: index of the first row, divided by 8.
      start, end: range of the group's rows within the tile.
      number: number of tiles, (1,); the arrays may be longer.
    """

    group: Array
    first: Array
    start: Array
    end: Array
    number: Array


def row_tiles(sizes: Array, num_rows: int, tile_rows: int) -> RowTiles:
    """Lists the tiles of groups of these sizes, one after another. A group's tiles begin with its first row.

    Rows are copied from multiples of 8 on, so that a tile may begin with up to 7 rows of other groups, and the last
    ones with more, because all tiles end within the rows.
    """
    ends = jnp.cumsum(sizes)
    first = (ends - sizes) // 8 * 8
    num_tiles = jnp.where(sizes > 0, -((first - ends) // tile_rows), 0)
    last = jnp.cumsum(num_tiles)
    index = jnp.arange((num_rows + sizes.shape[0] * (tile_rows + 6)) // tile_rows)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), sizes.shape[0] - 1)
    begin = first[group] + (index - (last - num_tiles)[group]) * tile_rows
    base = jnp.minimum(begin, num_rows - tile_rows)
    start = jnp.maximum(begin, (ends - sizes)[group]) - base
    end = jnp.minimum(ends[group], begin + tile_rows) - base
    return RowTiles(*(a.astype(jnp.int32) for a in (group, base // 8, start, end, last[-1:])))


def padded_rows(num_rows: int, tile_rows: int) -> int:
    """Returns the number of rows with padding to a multiple of 8 and at least one tile."""
    return max(num_rows + -num_rows % 8, tile_rows)


def tile_heights(sizes: Sequence[int], num_rows: int, tile_rows: int) -> list[int]:
    """Returns the number of rows that are read and computed for each tile of :func:`row_tiles`."""
    listed = row_tiles(jnp.array(sizes, jnp.int32), padded_rows(num_rows, tile_rows), tile_rows)
    half = tile_rows // 2
    return [half if end <= half else tile_rows for end in listed.end[: int(listed.number[0])].tolist()]


def multiply(rows: Array, weight: PackedWeights, sizes: Array, tiles: GroupedTiles, interpret: Any) -> Array:
    """Multiplies bfloat16 rows (P, C) by quantised weights: (P', M) with P' >= P; undefined in no group."""
    num_rows = padded_rows(rows.shape[0], tiles.rows)
    x = split_activations(jnp.pad(rows, ((0, num_rows - rows.shape[0]), (0, 0))), weight)
    row_tile_arrays = row_tiles(sizes, num_rows, tiles.rows)
    scales = weight.group_scales if weight.scale is None else _channel_scales(weight)
    operands = *row_tile_arrays, x, weight.bits, *([] if scales is None else [scales])
    out_dtype = jnp.bfloat16 if weight.num_outputs == 1 else jnp.uint32  # a uint32 packs two neighbouring channels
    num_blocks = _num_blocks(bool(interpret))
    scratch = _scratch(weight, tiles, out_dtype, bool(interpret))

    def grouped_matmul_kernel(*refs):
        (*listed_refs, x_ref, bits_ref), scale_refs = refs[:7], refs[7 : len(operands)]
        index, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        listed = RowTiles(*listed_refs)
        num_tiles = listed.number[0] * (weight.channels // tiles.channels)
        own_tiles = lax.div(num_tiles - index + num_blocks - 1, num_blocks)
        block = _Block(weight, tiles, own_tiles, x_ref, bits_ref, scale_refs, *refs[len(operands) :])

        def each_tile(run):
            def step(n, _):
                tile, half = _tile(listed, index + n * num_blocks, weight, tiles), tiles.rows // 2
                pl.when(tile.end <= half)(lambda: run(n, tile, half))
                pl.when(tile.end > half)(lambda: run(n, tile, tiles.rows))

            lax.fori_loop(0, own_tiles, step, None)

        @pl.when(warpgroup == tiles.computing)
        def _():
            if tiles.computing == 2:
                plgpu.set_max_registers(24, action="decrease")
            each_tile(block.copy_tiles)

        @pl.when(warpgroup < tiles.computing)
        def _():
            if tiles.computing == 2:
                plgpu.set_max_registers(240, action="increase")
            each_tile(partial(block.compute, warpgroup))
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        grouped_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, weight.channels), out_dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=tiles.computing + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    out = run(*operands)
    return out if weight.num_outputs == 1 else lax.bitcast_convert_type(out, jnp.bfloat16).reshape(out.shape[0], -1)


def _num_blocks(interpret: bool) -> int:
    """Returns the number of thread blocks: one for each multiprocessor, or that of an H100 or H200."""
    return 2 if interpret else getattr(jax.devices()[0], "core_count", 132)


class _Tile(NamedTuple):
    """An output tile: rows `start` to `end` of those from `first_row` on, a multiple of 8, times some channels."""

    group: Array
    first_row: Array
    start: Array
    end: Array
    channel_tile: Array


def _tile(listed: RowTiles, index: Array, weight: PackedWeights, t: GroupedTiles) -> _Tile:
    """Returns an output tile by index. Bands of row tiles follow each other, and channel tiles within a band."""
    channel_tiles = weight.channels // t.channels
    band = lax.div(index, t.band * channel_tiles)
    height = jnp.minimum(listed.number[0] - band * t.band, t.band)
    index = index - band * t.band * channel_tiles
    channel_tile = lax.div(index, height)
    tile = band * t.band + index - channel_tile * height
    return _Tile(listed.group[tile], listed.first[tile] * 8, listed.start[tile], listed.end[tile], channel_tile)


def _channel_scales(weight: PackedWeights) -> Array:
    """Returns each channel's scale, or pairs of neighbours in a uint32: (E, weight.channels)."""
    scales = weight.scale.reshape(weight.scale.shape[0], -1, weight.num_outputs)
    return scales[:, :, 0] if weight.num_outputs == 1 else lax.bitcast_convert_type(scales, jnp.uint32)


def _scratch(weight: PackedWeights, t: GroupedTiles, out_dtype: Any, interpret: bool) -> list[Any]:
    """Returns a thread block's shared memory, in the order of :class:`_Block`'s last fields."""
    tile = (t.channels, t.depth) if weight.contracted == 1 else (t.depth, t.channels)
    return [
        plgpu.SMEM((t.weight_slots, *tile), weight.bits.dtype),
        plgpu.SMEM((t.row_slots, t.rows, t.depth), jnp.bfloat16),
        plgpu.SMEM((t.computing, t.rows, _M), out_dtype),
        plgpu.Barrier(num_barriers=t.weight_slots),
        plgpu.Barrier(num_barriers=t.row_slots),
        plgpu.Barrier(num_arrivals=t.computing, num_barriers=t.weight_slots),
        plgpu.Barrier(num_arrivals=t.computing, num_barriers=t.row_slots),
        *([plgpu.SMEM((t.computing, _M, t.depth), jnp.bfloat16)] if interpret else []),
    ]


class _Block(NamedTuple):
    """One thread block's work on its output tiles, one after another.

    Attributes:
      num_tiles: number of output tiles.
      x: activations (num_inputs, rows, depth) in global memory, as are bits, scales (none or one array) and out.
      weights, rows: slots in shared memory, with a barrier each for filled slots and for those that may be filled.
      out_tiles: where each computing warpgroup gathers 64 channels of the output.
      interpreted_values: shared memory for unpacked weights, for the interpreter, whose wgmma takes no registers.
    """

    weight: PackedWeights
    tiles: GroupedTiles
    num_tiles: Array
    x: Any
    bits: Any
    scales: tuple[Any, ...]
    out: Any
    weights: Any
    rows: Any
    out_tiles: Any
    weights_filled: Any
    rows_filled: Any
    weights_free: Any
    rows_free: Any
    interpreted_values: Any = None

    @property
    def num_steps(self) -> int:
        """Number of steps along the contraction."""
        return self.weight.depth // self.tiles.depth

    def copy_tiles(self, n: Array, tile: _Tile, num_rows: int) -> None:
        """Copies the operands of the n-th output tile's first rows to shared memory, as slots become free."""
        t, num_inputs, bits = self.tiles, self.weight.num_inputs, self.bits.at[tile.group]
        channels = pl.ds(tile.channel_tile * t.channels, t.channels)

        def fill(count: Array, source: Any, slots: Any, filled: Any, free: Any) -> None:
            slot = lax.rem(count, slots.shape[0])
            pl.when(count >= slots.shape[0])(lambda: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source, slots.at[slot, pl.ds(0, source.shape[0])], filled.at[slot])

        def step(k, _):
            count, depth = n * self.num_steps + k, pl.ds(k * t.depth, t.depth)
            source = bits.at[channels, depth] if self.weight.contracted == 1 else bits.at[depth, channels]
            fill(count, source, self.weights, self.weights_filled, self.weights_free)
            for i in range(num_inputs):
                source = self.x.at[i, pl.ds(tile.first_row, num_rows), depth]
                fill(count * num_inputs + i, source, self.rows, self.rows_filled, self.rows_free)

        lax.fori_loop(0, self.num_steps, step, None)

    def compute(self, warpgroup: Array, n: Array, tile: _Tile, num_rows: int) -> None:
        """Computes this warpgroup's channels of the first rows of the n-th output tile."""
        half = self.tiles.channels // self.tiles.computing
        chunks = range(half // _M)
        first_channel = tile.channel_tile * self.tiles.channels + warpgroup * half
        channels = [pl.ds(first_channel + m * _M, _M) for m in chunks]
        num_outputs = self.weight.num_outputs
        scales = [ref.at[tile.group] for ref in self.scales]
        channel_scales = [] if self.weight.scale is None else [_load_by_channel(scales[0].at[c]) for c in channels]
        totals = pl.run_scoped(
            lambda *accs: self._accumulate(n, accs, warpgroup, channels, scales),
            *[plgpu.ACC((_M, num_rows))] * (len(chunks) * num_outputs),
        )
        shared = self.out_tiles.at[warpgroup, pl.ds(0, num_rows)]
        for m in chunks:
            sums = totals[m * num_outputs : (m + 1) * num_outputs]
            if channel_scales:
                sums = _scale_channels(sums, channel_scales[m])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _store_transposed(shared, plgpu.layout_cast(_to_bfloat16(sums), plgpu.Layout.WGMMA_TRANSPOSED))
            plgpu.commit_smem()
            _store_rows(shared, self.out, tile, channels[m])

    def _accumulate(self, n: Array, accs: Any, warpgroup: Array, channels: list, scales: list) -> tuple[Array, ...]:
        """Sums over all steps; returns the sums (channels, rows) of each chunk of 64 channels and each output."""
        weight, t = self.weight, self.tiles
        num_inputs, num_outputs = weight.num_inputs, weight.num_outputs
        offsets = [(warpgroup * len(channels) + m) * _M for m in range(len(channels))]
        num_steps, is_plain = self.num_tiles * self.num_steps, weight.kind == "plain"

        def release(count: Array, num_counts: Array, slots: int, free: Any) -> None:
            """Frees the slot with the count-th tile, if another will be copied there."""
            pl.when((count >= 0) & (count + slots < num_counts))(
                lambda: plgpu.barrier_arrive(free.at[lax.rem(count, slots)])
            )

        def step(k, step_scales):
            count = n * self.num_steps + k
            slot = lax.rem(count, t.weight_slots)
            plgpu.barrier_wait(self.weights_filled.at[slot])
            packed = [self._load_weights(slot, offset) for offset in offsets]
            next_scales = self._load_scales(scales, channels, jnp.minimum(k + 1, self.num_steps - 1))
            for i in range(num_inputs):
                row_count = count * num_inputs + i
                row_slot = lax.rem(row_count, t.row_slots)
                plgpu.barrier_wait(self.rows_filled.at[row_slot])
                for j, acc in enumerate(accs):
                    m, output = divmod(j, num_outputs)
                    values = self._unpack(packed[m], output * num_inputs + i)
                    if step_scales:
                        values = values * self._expand_scales(step_scales[m], output)
                    self._multiply(acc, values, self.rows.at[row_slot, pl.ds(0, acc.shape[1])], warpgroup)
                    plgpu.wgmma_wait(1)  # this product runs while the next weights are unpacked
                    if j == 0:  # all products before this one are done
                        release(row_count - 1, num_steps * num_inputs, t.row_slots, self.rows_free)
                        if is_plain and i == 0:
                            release(count - 1, num_steps, t.weight_slots, self.weights_free)
                    if not is_plain and i == 0 and j == len(accs) - 1:
                        # Each register of packed weights has been unpacked once, so it has arrived. Before that the
                        # slot may still be read: the arrival at a barrier does not wait for loads to finish.
                        if self.interpreted_values is not None:
                            plgpu.commit_smem()  # the interpreter finds a race between loads and copies otherwise
                        release(count, num_steps, t.weight_slots, self.weights_free)
            return next_scales

        lax.fori_loop(0, self.num_steps, step, self._load_scales(scales, channels, 0))
        return tuple(acc[...] for acc in accs)

    def _load_weights(self, slot: Array, offset: Array) -> Any:
        """Loads 64 channels of a weight tile, (channels, depth); plain weights stay in shared memory."""
        channels = pl.ds(offset, _M)
        by_channel = self.weight.contracted == 1
        ref = self.weights.at[slot, channels] if by_channel else self.weights.at[slot, :, channels].transpose((1, 0))
        return ref if self.weight.kind == "plain" else ref[...]

    def _unpack(self, packed: Any, position: int) -> Any:
        if self.weight.kind == "plain":
            return packed
        return (unpack_registers if self.interpreted_values is None else unpack)(packed, self.weight.kind, position)

    def _multiply(self, acc: Any, values: Any, rows: Any, warpgroup: Array) -> None:
        """Adds values (channels, depth) times the transpose of rows (N, depth) to acc (channels, N)."""
        if self.interpreted_values is not None and self.weight.kind != "plain":
            self.interpreted_values[warpgroup] = values
            values = self.interpreted_values.at[warpgroup]
        plgpu.wgmma(acc, values, rows.transpose((1, 0)))

    def _load_scales(self, scales: list, channels: list, step: Any) -> list[list[Array]]:
        """Loads a step's pairs of group scales, for each chunk of channels; empty without groups."""
        if self.weight.group_depth is None:
            return []
        (ref,), num_pairs = scales, self.tiles.depth // self.weight.period
        pairs = [step * num_pairs + p for p in range(num_pairs)]
        if self.weight.contracted == 1:
            return [[_load_by_channel(ref.at[c, p]) for p in pairs] for c in channels]
        return [[_load_by_channel(ref.at[p, c]) for p in pairs] for c in channels]

    def _expand_scales(self, pairs: list[Array], output: int) -> Array:
        """Returns the scale of each weight of a tile of 64 channels, (channels, depth), from its groups' pairs."""
        halves = [split_scales(pair) for pair in pairs]
        groups = [h for pair in halves for h in pair] if self.weight.contracted == 1 else [h[output] for h in halves]
        shape = _M, self.weight.group_depth
        parts = [lax.broadcast_in_dim(g.astype(jnp.bfloat16), shape, (0,)) for g in groups]
        return parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)


def _load_by_channel(ref: Any) -> Array:
    """Loads one element per channel of a tile to the threads that accumulate that channel."""
    load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run these kernels
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _scale_channels(totals: tuple[Array, ...], stored: Array) -> tuple[Array, ...]:
    """Multiplies the sums of each output by their channels' scales."""
    scales = [stored] if len(totals) == 1 else split_scales(stored)
    return tuple(
        t * lax.broadcast_in_dim(s.astype(jnp.float32), t.shape, (0,)) for t, s in zip(totals, scales, strict=True)
    )


def _store_transposed(tile: Any, values: Array) -> None:
    """Stores values (channels, rows) in a tile (rows, channels) of shared memory."""
    store: Callable[..., None] | None = getattr(plgpu, "store", None)
    if store is None:  # jax 0.11, which finds the layout itself
        tile.transpose((1, 0))[...] = values
    else:
        store(tile.transpose((1, 0)), values, optimized=False)


def _to_bfloat16(totals: tuple[Array, ...]) -> Array:
    """Casts the sums of one output to bfloat16; packs those of two in a uint32."""
    if len(totals) == 1:
        return totals[0].astype(jnp.bfloat16)
    low, high = (lax.bitcast_convert_type(t.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for t in totals)
    return low | high << 16


def _store_rows(shared: Any, out: Any, tile: _Tile, channels: Any) -> None:
    """Copies the group's rows of a tile to global memory, with one copy of static size per bit of their number."""
    start, num_rows = tile.start, tile.end - tile.start
    for bit in reversed(range(shared.shape[0].bit_length())):
        size = 1 << bit

        @pl.when((num_rows & size) != 0)
        def _(start=start, size=size):
            rows = out.at[pl.ds(tile.first_row + start, size), channels]
            plgpu.copy_smem_to_gmem(shared.at[pl.ds(start, size)], rows)

        start = start + (num_rows & size)
