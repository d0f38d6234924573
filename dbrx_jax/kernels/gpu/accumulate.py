"""Accumulates one tile of output channels times rows on a Hopper GPU, in a thread block of 128 threads.

TMA copies tiles of packed weights (packed_weights.py) and activations to shared memory some steps ahead. Quantised
weights are loaded to registers, unpacked to bfloat16 and multiplied from there by wgmma, which accumulates in float32.
Plain weights are multiplied from shared memory.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, split_scales, unpack


class Block(NamedTuple):
    """One thread block's output tile and range of the contraction.

    Attributes:
      tiles: its `channels` and `depth` are the weight tile's size in elements of `weight.bits`, `steps` the number of
        pipeline steps in flight. A wgmma has 64 channels.
      rows: rows of an activation tile, a multiple of 8.
      channel_tile, row_tile: indices of the output tile.
      first_step, num_steps: range of steps along the contraction.
    """

    weight: PackedWeights
    tiles: Any
    rows: int
    channel_tile: Array
    row_tile: Array | int
    first_step: Array | int
    num_steps: int
    interpret: bool

    @property
    def accumulator(self) -> Any:
        return plgpu.ACC((self.tiles.channels, self.rows))

    def load(self, ref: Any) -> tuple[Any, ...]:
        """Loads a tile's weights, channels first: bfloat16 in registers, or in shared memory if it is plain."""
        if self.weight.contracted == 0:
            ref = ref.transpose((1, 0))
        return (ref,) if self.weight.kind == "plain" else unpack(ref[...], self.weight.kind)

    def multiply(self, acc: Any, weights: Any, rows: Any) -> None:
        """Adds weights (channels, depth) times the transpose of rows (N, depth) to acc (channels, N)."""
        if self.interpret and self.weight.kind != "plain":
            # The interpreter has no wgmma with an operand in registers; it takes the weights from shared memory.
            def multiply_shared(shared):
                shared[...] = weights
                plgpu.wgmma(acc, shared, rows.transpose((1, 0)))

            pl.run_scoped(multiply_shared, plgpu.SMEM(weights.shape, weights.dtype))
        else:
            plgpu.wgmma(acc, weights, rows.transpose((1, 0)))


def accumulate_tile(block: Block, bits: list, scales: list, x: Any) -> tuple[Array, ...]:
    """Computes the float32 sums (channels, rows) of each weight and each of its outputs, in that order.

    Args:
      bits: one expert's packed values of each weight, in global memory.
      scales: group scales of each weight, in global memory; empty without groups.
      x: activations (num_inputs, rows, depth) in global memory.
    """
    inputs = [x.at[i] for i in range(block.weight.num_inputs)]
    if block.weight.group_depth is None:
        return _accumulate_channels(block, bits, inputs)
    return _accumulate_groups(block, bits, scales, inputs)


def _run_pipeline(block: Block, step: Any, bits: list, x: list, carry: Any = None) -> Any:
    """Runs `step` on the tiles of each weight and each input, for each of the block's steps."""
    t, first = block.tiles, block.first_step
    if block.weight.contracted == 1:
        weight_spec = plgpu.BlockSpec((t.channels, t.depth), lambda k: (block.channel_tile, first + k))
    else:
        weight_spec = plgpu.BlockSpec((t.depth, t.channels), lambda k: (first + k, block.channel_tile))
    row_spec = plgpu.BlockSpec((block.rows, t.depth), lambda k: (block.row_tile, first + k))
    specs = [weight_spec] * len(bits) + [row_spec] * len(x)
    grid = (block.num_steps,)
    pipeline = plgpu.emit_pipeline(step, grid=grid, in_specs=specs, max_concurrent_steps=t.steps, init_carry=carry)
    return pipeline(*bits, *x)


def _accumulate_channels(block: Block, bits: list, x: list) -> tuple[Array, ...]:
    """Accumulates weights without group scales: each sum stays in one accumulator over all steps."""
    num_outputs = block.weight.num_outputs

    def scope(*accs):
        def step(_, *refs):
            tiles, rows = refs[: len(bits)], refs[len(bits) :]
            for w, ref in enumerate(tiles):
                for position, weights in enumerate(block.load(ref)):
                    acc = accs[w * num_outputs + position // len(x)]
                    block.multiply(acc, weights, rows[position % len(x)])
            plgpu.wgmma_wait(0)

        _run_pipeline(block, step, bits, x)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scope, *[block.accumulator] * (len(bits) * num_outputs))


def _accumulate_groups(block: Block, bits: list, scales: list, x: list) -> tuple[Array, ...]:
    """Accumulates weights with group scales: sums each group alone, scales it and adds it to the loop carry."""
    group_depth, num_outputs = block.weight.group_depth, block.weight.num_outputs
    num_groups = block.tiles.depth // group_depth

    def step(index, *refs):
        *refs, totals = refs
        tiles, rows = refs[: len(bits)], refs[len(bits) :]
        new_totals = []
        for w, ref in enumerate(tiles):
            group_scales = [_load_group_scales(block, scales[w], index[0], g) for g in range(num_groups)]
            weights = block.load(ref)
            for output in range(num_outputs):
                output_weights = weights[output * len(x) : (output + 1) * len(x)]
                total = totals[len(new_totals)]
                for g in range(num_groups):
                    group_sum = _group_sum(block, output_weights, rows, g * group_depth)
                    total = total + group_sum * group_scales[g][output]
                new_totals.append(total)
        return tuple(new_totals)

    zeros = jnp.zeros((block.tiles.channels, block.rows), jnp.float32)
    carry = (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (len(bits) * num_outputs)
    return _run_pipeline(block, step, bits, x, carry)


def _group_sum(block: Block, weights: tuple, rows: list, start: int) -> Array:
    """Multiplies one group's weights of each input, which begin at `start` along the contraction, and sums them."""
    group_depth = block.weight.group_depth

    def scope(acc):
        for w, x in zip(weights, rows, strict=True):
            block.multiply(acc, w[:, start : start + group_depth], x.at[:, pl.ds(start, group_depth)])
        return acc[...]

    return pl.run_scoped(scope, block.accumulator)


def _load_group_scales(block: Block, ref: Any, step: Array, g: int) -> list[Array]:
    """Loads group g's scales in a step, one array (channels, rows) per output."""
    t, weight = block.tiles, block.weight
    group = (block.first_step + step) * (t.depth // weight.group_depth) + g
    channels = pl.ds(block.channel_tile * t.channels, t.channels)
    index = (channels, group // 2) if weight.contracted == 1 else (group, channels)
    low, high = split_scales(load_by_channel(ref.at[index]))
    scales = [low, high] if weight.contracted == 0 else [high if g % 2 else low]
    return [lax.broadcast_in_dim(s, (t.channels, block.rows), (0,)) for s in scales]


def load_by_channel(ref: Any) -> Array:
    """Loads one element per channel of a tile to the threads that accumulate that channel."""
    load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run these kernels
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
