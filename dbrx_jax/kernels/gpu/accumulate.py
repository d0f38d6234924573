"""Accumulates one tile of output channels times rows on a Hopper GPU, in a thread block of 128 threads.

TMA copies tiles of packed weights (packed_weights.py) and activations to shared memory some steps ahead. fp8 weights
are loaded to registers, unpacked to bfloat16 and multiplied from there by wgmma, which accumulates in float32. Plain
weights are multiplied from shared memory.
"""

from typing import Any, NamedTuple

from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu.grouped_unpack import unpack
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights


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
        if self.weight.kind == "plain":
            return (ref,)
        packed = ref[...]
        return tuple(unpack(packed, self.weight.kind, position) for position in range(2))

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


def _run_pipeline(block: Block, step: Any, bits: list, x: list) -> None:
    """Runs `step` on the tiles of each weight and each input, for each of the block's steps."""
    t, first = block.tiles, block.first_step
    if block.weight.contracted == 1:
        weight_spec = plgpu.BlockSpec((t.channels, t.depth), lambda k: (block.channel_tile, first + k))
    else:
        weight_spec = plgpu.BlockSpec((t.depth, t.channels), lambda k: (first + k, block.channel_tile))
    row_spec = plgpu.BlockSpec((block.rows, t.depth), lambda k: (block.row_tile, first + k))
    specs = [weight_spec] * len(bits) + [row_spec] * len(x)
    grid = (block.num_steps,)
    pipeline = plgpu.emit_pipeline(step, grid=grid, in_specs=specs, max_concurrent_steps=t.steps)
    pipeline(*bits, *x)


def accumulate_tile(block: Block, bits: list, x: Any) -> tuple[Array, ...]:
    """Computes the float32 sums (channels, rows) of each weight and each of its outputs, in that order.

    Args:
      bits: one expert's packed values of each weight, in global memory.
      x: activations (num_inputs, rows, depth) in global memory.
    """
    num_outputs, num_inputs = block.weight.num_outputs, block.weight.num_inputs

    def scope(*accs):
        def step(_, *refs):
            tiles, rows = refs[: len(bits)], refs[len(bits) :]
            for w, ref in enumerate(tiles):
                for position, weights in enumerate(block.load(ref)):
                    acc = accs[w * num_outputs + position // num_inputs]
                    block.multiply(acc, weights, rows[position % num_inputs])
            plgpu.wgmma_wait(0)

        _run_pipeline(block, step, bits, [x.at[i] for i in range(num_inputs)])
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scope, *[block.accumulator] * (len(bits) * num_outputs))


def load_by_channel(ref: Any) -> Array:
    """Loads one element per channel of a tile to the threads that accumulate that channel."""
    load: Any = plgpu.load  # its signature requires an index before jax 0.11, which does not run these kernels
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
