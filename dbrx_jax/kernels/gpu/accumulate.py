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
    """The work of one thread block: an output tile, over its range of the contraction.

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

    def specs(self, num_weights: int) -> list[plgpu.BlockSpec]:
        """Block specs of the weights' tiles and the activations in step k."""
        t = self.tiles
        if self.weight.contracted == 1:
            tile = plgpu.BlockSpec((t.channels, t.depth), lambda k: (self.channel_tile, self.first_step + k))
        else:
            tile = plgpu.BlockSpec((t.depth, t.channels), lambda k: (self.first_step + k, self.channel_tile))
        rows = plgpu.BlockSpec((self.rows, t.depth), lambda k: (self.row_tile, self.first_step + k))
        return [tile] * num_weights + [rows] * self.weight.num_inputs

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
    accumulate = _accumulate_channels if block.weight.group_depth is None else _accumulate_groups
    return accumulate(block, bits, scales, inputs)


def _run_pipeline(block: Block, step: Any, refs: list, num_weights: int, carry: Any = None) -> Any:
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(block.num_steps,),
        in_specs=block.specs(num_weights),
        max_concurrent_steps=block.tiles.steps,
        init_carry=carry,
    )
    return pipeline(*refs)


def _accumulate_channels(block: Block, bits: list, scales: list, x: list) -> tuple[Array, ...]:
    """Accumulates weights without group scales: each sum stays in one accumulator over all steps."""
    num_outputs = block.weight.num_outputs

    def scope(*accs):
        def step(_, *refs):
            tiles, rows = refs[: len(bits)], refs[len(bits) :]
            for w, ref in enumerate(tiles):
                for p, weights in enumerate(block.load(ref)):
                    acc = accs[w * num_outputs + p // len(x)]
                    block.multiply(acc, weights, rows[p % len(x)])
            plgpu.wgmma_wait(0)

        _run_pipeline(block, step, [*bits, *x], len(bits))
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scope, *[block.accumulator] * (len(bits) * num_outputs))


def _accumulate_groups(block: Block, bits: list, scales: list, x: list) -> tuple[Array, ...]:
    """Accumulates weights with group scales: sums each group alone, scales it and adds it to the loop carry."""
    group_depth = block.weight.group_depth
    num_groups = block.tiles.depth // block.weight.group_depth

    def step(index, *refs):
        *refs, totals = refs
        tiles, rows = refs[: len(bits)], refs[len(bits) :]
        new_totals = []
        for w, ref in enumerate(tiles):
            group_scales = [_load_group_scales(block, scales[w], index[0], g) for g in range(num_groups)]
            weights = block.load(ref)
            for output in range(block.weight.num_outputs):
                total = totals[len(new_totals)]
                for g in range(num_groups):
                    output_weights = weights[output * len(x) : (output + 1) * len(x)]
                    group_sum = _group_sum(block, output_weights, rows, g * group_depth)
                    total = total + group_sum * group_scales[g][output]
                new_totals.append(total)
        return tuple(new_totals)

    zeros = jnp.zeros((block.tiles.channels, block.rows), jnp.float32)
    carry = (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (len(bits) * block.weight.num_outputs)
    return _run_pipeline(block, step, [*bits, *x], len(bits), carry)


def _group_sum(block: Block, inputs: tuple, rows: list, start: int) -> Array:
    """Sums one group's products, which begin at `start` along the contraction."""
    group_depth = block.weight.group_depth

    def scope(acc):
        for weights, row in zip(inputs, rows, strict=True):
            block.multiply(acc, weights[:, start : start + group_depth], row.at[:, pl.ds(start, group_depth)])
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
