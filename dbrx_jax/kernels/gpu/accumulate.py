"""Accumulates one output tile on a Hopper GPU: a block of 128 threads, channels times rows of activations.

TMA copies packed weights (packed_weights.py) and rows into shared memory some steps ahead; weights go into registers,
are dequantised to bfloat16 and multiplied from there by wgmma, which sums in float32. Plain weights are multiplied from
shared memory.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, split_scales, unpack


class Block(NamedTuple):
    """A block's part of a product.

    Attributes:
      tiles: channels (words of them), depth (words along the contraction in a step) and steps (on their way at
        once); 64 channels fill a wgmma.
      rows: in a tile of activations, a multiple of 8.
      channel: which tile of channels.
      row: which tile of rows.
      first: step along the contraction.
      number: of steps.
      interpret: whether this runs in Pallas' interpreter.
    """

    weight: PackedWeights
    tiles: Any
    rows: int
    channel: Array
    row: Array | int
    first: Array | int
    number: int
    interpret: bool

    @property
    def acc(self) -> Any:
        return plgpu.ACC((self.tiles.channels, self.rows))

    def specs(self, weights: int) -> list[plgpu.BlockSpec]:
        """Block specs of the weights' tiles and the activations in step k."""
        t = self.tiles
        if self.weight.contracted == 1:
            tile = plgpu.BlockSpec((t.channels, t.depth), lambda k: (self.channel, self.first + k))
        else:
            tile = plgpu.BlockSpec((t.depth, t.channels), lambda k: (self.first + k, self.channel))
        rows = plgpu.BlockSpec((self.rows, t.depth), lambda k: (self.row, self.first + k))
        return [tile] * weights + [rows] * self.weight.inputs

    def load(self, ref: Any) -> tuple[Any, ...]:
        """A tile's bfloat16 weights, channels first: in registers, or in shared memory if it is plain."""
        if self.weight.contracted == 0:
            ref = ref.transpose((1, 0))
        return (ref,) if self.weight.kind == "plain" else unpack(ref[...], self.weight.kind)

    def multiply(self, acc: Any, plane: Any, rows: Any) -> None:
        """Adds weights (channels, depth) times rows (N, depth), transposed, to sums (channels, N)."""
        if self.interpret and self.weight.kind != "plain":
            # The interpreter knows no product with registers: the same by way of shared memory.
            def through(shared):
                shared[...] = plane
                plgpu.wgmma(acc, shared, rows.transpose((1, 0)))

            pl.run_scoped(through, plgpu.SMEM(plane.shape, plane.dtype))
        else:
            plgpu.wgmma(acc, plane, rows.transpose((1, 0)))


def accumulate_tile(block: Block, bits: list, scales: list, x: Any) -> tuple[Array, ...]:
    """Sums (channels, rows) of each weight and output, in that order, in float32.

    Args:
      bits: one expert's packed values of each weight, in global memory.
      scales: by group, likewise; empty without groups.
      x: activations (inputs, rows, depth), there too.
    """
    planes_refs = [x.at[i] for i in range(block.weight.inputs)]
    summed = _by_channel if block.weight.group is None else _by_group
    return summed(block, bits, scales, planes_refs)


def _emit(block: Block, step: Any, refs: list, weights: int, carry: Any = None) -> Any:
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(block.number,),
        in_specs=block.specs(weights),
        max_concurrent_steps=block.tiles.steps,
        init_carry=carry,
    )
    return pipeline(*refs)


def _by_channel(block: Block, bits: list, scales: list, x: list) -> tuple[Array, ...]:
    """All of a sum stays in one accumulator."""
    outputs = block.weight.outputs

    def scope(*accs):
        def step(_, *refs):
            tiles, rows = refs[: len(bits)], refs[len(bits) :]
            for w, ref in enumerate(tiles):
                for p, plane in enumerate(block.load(ref)):
                    acc = accs[w * outputs + p // len(x)]
                    block.multiply(acc, plane, rows[p % len(x)])
            plgpu.wgmma_wait(0)

        _emit(block, step, [*bits, *x], len(bits))
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(scope, *[block.acc] * (len(bits) * outputs))


def _by_group(block: Block, bits: list, scales: list, x: list) -> tuple[Array, ...]:
    """Each group of a step is summed alone, scaled, and added to totals that the pipeline carries."""
    group, count = block.weight.group, block.tiles.depth // block.weight.group

    def step(index, *refs):
        *refs, totals = refs
        tiles, rows = refs[: len(bits)], refs[len(bits) :]
        new = []
        for w, ref in enumerate(tiles):
            by_group = [_group_scales(block, scales[w], index[0], g) for g in range(count)]
            loaded = block.load(ref)
            for output in range(block.weight.outputs):
                total = totals[len(new)]
                for g in range(count):
                    own = loaded[output * len(x) : (output + 1) * len(x)]
                    total = total + _group_sum(block, own, rows, g * group) * by_group[g][output]
                new.append(total)
        return tuple(new)

    zeros = jnp.zeros((block.tiles.channels, block.rows), jnp.float32)
    carry = (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * (len(bits) * block.weight.outputs)
    return _emit(block, step, [*bits, *x], len(bits), carry)


def _group_sum(block: Block, own: tuple, rows: list, start: int) -> Array:
    group = block.weight.group

    def scope(acc):
        for plane, row in zip(own, rows, strict=True):
            block.multiply(acc, plane[:, start : start + group], row.at[:, pl.ds(start, group)])
        return acc[...]

    return pl.run_scoped(scope, block.acc)


def _group_scales(block: Block, ref: Any, step: Array, g: int) -> list[Array]:
    """Group g's scales of each output in a step, (channels, N) each."""
    t, weight = block.tiles, block.weight
    first = (block.first + step) * (t.depth // weight.group) + g
    channels = pl.ds(block.channel * t.channels, t.channels)
    where = (channels, first // 2) if weight.contracted == 1 else (first, channels)
    low, high = split_scales(by_channel(ref.at[where]))
    scales = [low, high] if weight.contracted == 0 else [high if g % 2 else low]
    return [lax.broadcast_in_dim(s, (t.channels, block.rows), (0,)) for s in scales]


def by_channel(ref: Any) -> Array:
    """One element for each channel of a tile, where the threads that sum the channel have it."""
    load: Any = plgpu.load  # before jax 0.11, which runs none of this, an index had to be given
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
