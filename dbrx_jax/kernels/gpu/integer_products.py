"""Products of fixed-point rows with quantised weights of chosen experts on Hopper GPUs, for few rows.

A product is a list of items: an expert, and rows for it. A thread block computes 64 packed channels of an item over
its split of the contraction. TMA copies tiles of weights and activations to shared memory some steps ahead. The matrix
unit multiplies int8 digits exactly; sums of a group of int4 weights are scaled and added in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu.accumulate import load_by_channel
from dbrx_jax.kernels.gpu.fixed_point import DIGITS, FixedPoint
from dbrx_jax.kernels.gpu.integer_operands import WGMMA, combine_digits, load_column, load_operands, store_rows
from dbrx_jax.kernels.gpu.integer_weights import BLOCK, CHANNELS, INT4_FACTOR, IntegerWeights
from dbrx_jax.kernels.gpu.packed_weights import pairs, split_scales

_GRID = ("item", "channel_tile", "split")  # in shard_map, names of mesh axes would refer to the mesh
_MAX_ACCUMULATORS = 64  # 32-bit registers of a lane that accumulate groups at a time
_SLAB = 128  # bytes along the contraction whose operands are in registers at a time


class IntegerTiles(NamedTuple):
    """Tile sizes of a product.

    Attributes:
      depth: bytes along the contraction per pipeline step.
      steps: pipeline steps in flight.
      splits: parts of the contraction, each in a thread block of its own.
    """

    depth: int
    steps: int
    splits: int


def multiply(
    x: FixedPoint,
    products: Sequence[tuple[IntegerWeights, ...]],
    experts: Array,
    num_items: Array,
    tiles: IntegerTiles,
    activation: Callable[[Array], Array] | None = None,
    interpret: Any = None,
    name: str = "multiply",
) -> list[Array]:
    """Multiplies each item's rows by its expert's weights: for each product float32 (I, splits, N, M).

    Results are undefined from num_items on.

    Args:
      x: digits (I or 1, parts, 2 N, depth) as :func:`integer_weights.split_activations` returns them, and
        largest values (I or 1, N); N a multiple of 4. One entry is every item's.
      products: each one weight; or, with an activation, gate and up of one shape, whose result is
        activation(gate) * up. Weights of all products have one kind and depth, and may have different channels.
      experts: each item's expert (I,).
      activation: not with splits.
      name: of the kernel in profiles.
    """
    assert all(len(weights) == (1 if activation is None else 2) for weights in products)
    assert activation is None or tiles.splits == 1
    shape = experts.shape[0], tiles.splits, x.digits.shape[2] // DIGITS
    digits = x.digits.reshape(x.digits.shape[0], -1, x.digits.shape[3])  # parts after one another
    runs, arrays, first = [], [], 0
    for weights in products:
        runs.append(_Product(weights, x.digits.shape[2], tiles, activation, bool(interpret), first))
        arrays += [*(w.bits for w in weights), *map(_scales, weights)]
        first += weights[0].channels // CHANNELS

    def body(num_items_ref, experts_ref, digits_ref, largest_ref, *refs):
        item = lax.axis_index(_GRID[0])

        @pl.when(item < num_items_ref[0])
        def _():
            place = _Place(experts_ref[item], lax.axis_index(_GRID[1]), lax.axis_index(_GRID[2]))
            entry = item if digits_ref.shape[0] > 1 else 0
            arrays, outs, scratch = refs[: -len(runs) - 1], refs[-len(runs) - 1 : -1], refs[-1]
            size = len(arrays) // len(runs)
            for number, (run, out) in enumerate(zip(runs, outs, strict=True)):
                run_refs = arrays[number * size : (number + 1) * size]
                run.body(place, digits_ref.at[entry], largest_ref.at[entry], run_refs, out.at[item], scratch)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((*shape, w[0].num_outputs * w[0].channels), jnp.float32) for w in products],
        grid=(experts.shape[0], first, tiles.splits),
        grid_names=_GRID,
        scratch_types=[runs[0].scratch()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(jnp.reshape(num_items, 1).astype(jnp.int32), experts.astype(jnp.int32), digits, x.largest, *arrays)


def _scales(weight: IntegerWeights) -> Array:
    """Returns the scales of groups or channels; of weights with two outputs, pairs of neighbouring channels'."""
    if weight.scale is None:
        return weight.group_scales
    if weight.num_outputs == 1:
        return weight.scale
    return pairs(weight.scale, jnp.uint32)


class _Product(NamedTuple):
    """A kernel's constants of one product.

    Attributes:
      columns: digits of an item's rows.
      first_tile: the number of tiles of channels of the products before it.
    """

    weights: tuple[IntegerWeights, ...]
    columns: int
    tiles: IntegerTiles
    activation: Callable[[Array], Array] | None
    interpret: bool
    first_tile: int

    @property
    def num_outputs(self) -> int:
        return self.weights[0].num_outputs

    @property
    def split_depth(self) -> int:
        """Bytes along the contraction of a split."""
        return self.weights[0].depth // self.tiles.splits

    @property
    def split_groups(self) -> int:
        """Groups of a split."""
        return self.split_depth // BLOCK * self.weights[0].groups_per_block

    def scratch(self) -> dict[str, Any]:
        """Returns the shared memory of a thread block."""
        rows = self.columns // DIGITS
        scratch: dict[str, Any] = {"out": plgpu.SMEM((rows, self.num_outputs * CHANNELS), jnp.float32)}
        if self.weights[0].group is not None:
            shape, dtype = ((CHANNELS, self.split_groups), jnp.bfloat16)
            if self.weights[0].contracted == 0:
                shape, dtype = ((self.split_groups, CHANNELS), jnp.uint32)
            scratch["scales"] = [plgpu.SMEM(shape, dtype)] * len(self.weights)
            scratch["barrier"] = plgpu.Barrier(num_arrivals=len(self.weights))
        return scratch

    def body(self, place: "_Place", digits: Any, largest: Any, refs: list, out: Any, scratch: dict[str, Any]) -> None:
        """Computes one tile of channels of one item over one split, if the tile is one of this product's."""
        n, tile = len(self.weights), place.tile - self.first_tile

        @pl.when((tile >= 0) & (tile < self.weights[0].channels // CHANNELS))
        def _():
            here = place._replace(tile=tile)
            bits, scales = ([ref.at[place.expert] for ref in some] for some in (refs[:n], refs[n:]))
            if self.weights[0].group is None:
                totals = self._accumulate_channels(here, bits, digits)
            else:
                self._start_scales(here, scales, scratch)
                totals = self._accumulate_groups(here, bits, digits, scratch)
            outputs = self._finish(here, totals, scales, largest)
            store_rows(scratch["out"], outputs, self.interpret)
            plgpu.commit_smem()
            size = self.num_outputs * CHANNELS
            plgpu.copy_smem_to_gmem(scratch["out"], out.at[place.split, :, pl.ds(tile * size, size)])
            plgpu.wait_smem_to_gmem(0)

    def _pipeline(self, place: "_Place", step: Any, bits: list, digits: Any, carry: Any = None) -> Any:
        """Runs `step` on the tiles of each weight and of the activations' parts, for each step of the split."""
        depth, weight = self.tiles.depth, self.weights[0]
        steps = self.split_depth // depth
        first = place.split * steps
        if weight.contracted == 1:
            weight_spec = plgpu.BlockSpec((CHANNELS, depth), lambda k: (place.tile, first + k))
        else:
            weight_spec = plgpu.BlockSpec((depth, CHANNELS), lambda k: (first + k, place.tile))
        digits_spec = plgpu.BlockSpec((digits.shape[0], depth), lambda k: (0, first + k))
        specs = [weight_spec] * len(bits) + [digits_spec]
        in_flight = self.tiles.steps
        pipeline = plgpu.emit_pipeline(
            step, grid=(steps,), in_specs=specs, max_concurrent_steps=in_flight, init_carry=carry
        )
        return pipeline(*bits, digits)

    def _accumulate_channels(self, place: "_Place", bits: list, digits: Any) -> list[Array]:
        """Accumulates weights without groups: each output's sum stays in one accumulator over all steps."""
        n, outputs = len(bits), self.num_outputs

        def scope(*accs):
            def step(_, *refs):
                for w in range(n):
                    for block, operands in enumerate(load_operands(refs[w], self.weights[w], self.interpret)):
                        for output, operand in enumerate(operands):
                            rows = [_block(x, block, operand[0].shape[1]) for x in self._parts(refs[n])]
                            self._add_products(accs[w * outputs + output], operand, rows)
                plgpu.wgmma_wait(0)

            self._pipeline(place, step, bits, digits)
            return tuple(acc[...] for acc in accs)

        totals = pl.run_scoped(scope, *[self._accumulator] * (n * outputs))
        return [t.astype(jnp.float32) for t in totals]

    def _accumulate_groups(self, place: "_Place", bits: list, digits: Any, scratch: dict[str, Any]) -> list[Array]:
        """Accumulates weights with group scales: scales each group's exact sum and adds it to the loop carry."""
        n, outputs, depth = len(bits), self.num_outputs, self.tiles.depth
        at_once = max(outputs, _MAX_ACCUMULATORS // (self.columns // 2))

        def step(index, *refs):
            *refs, x, totals = refs
            totals = list(totals)

            @pl.when(index[0] == 0)
            def _():
                plgpu.barrier_wait(scratch["barrier"])

            for start in range(0, depth, _SLAB):
                slab = pl.ds(start, min(depth, _SLAB))
                weights = [r.at[:, slab] if self.weights[0].contracted == 1 else r.at[slab] for r in refs]
                jobs = self._jobs(weights, [part.at[:, slab] for part in self._parts(x)])
                first_group = (index[0] * depth + start) // BLOCK * self.weights[0].groups_per_block
                for first in range(0, len(jobs), at_once):
                    chunk = jobs[first : first + at_once]
                    for job, total in zip(chunk, self._group_sums(chunk), strict=True):
                        scale = self._group_scale(scratch["scales"][job.weight], first_group + job.group, job.output)
                        totals[job.weight * outputs + job.output] += total * self._by_channel(scale)
            return tuple(totals)

        zeros = plgpu.layout_cast(jnp.zeros((CHANNELS, self.columns), jnp.float32), WGMMA)
        return list(self._pipeline(place, step, bits, digits, (zeros,) * (n * outputs)))

    def _parts(self, digits: Any) -> list:
        """Returns the parts (columns, depth) of a tile of activations."""
        return [digits.at[pl.ds(start, self.columns)] for start in range(0, digits.shape[0], self.columns)]

    def _jobs(self, weights: list, parts: list) -> list["_Job"]:
        """Loads the operands of tiles of each weight, and lists their products with each group's activations."""
        jobs, inputs = [], self.weights[0].num_inputs
        for w, ref in enumerate(weights):
            for block, outputs in enumerate(load_operands(ref, self.weights[w], self.interpret)):
                for g in range(self.weights[w].groups_per_block):
                    rows = [_block(x, block, BLOCK) for x in parts[g * inputs : (g + 1) * inputs]]
                    group = block * self.weights[w].groups_per_block + g
                    jobs += [_Job(w, output, group, operands, rows) for output, operands in enumerate(outputs)]
        return jobs

    def _group_sums(self, jobs: Sequence["_Job"]) -> tuple[Array, ...]:
        """Computes each job's sum in an accumulator of its own, waits for them all and converts them to float32."""

        def scope(*accs):
            for acc, job in zip(accs, jobs, strict=True):
                self._add_products(acc, job.operands, job.rows)
            return tuple(acc[...].astype(jnp.float32) for acc in accs)

        return pl.run_scoped(scope, *[self._accumulator] * len(jobs))

    @property
    def _accumulator(self) -> Any:
        return plgpu.ACC((CHANNELS, self.columns), jnp.int32)

    def _add_products(self, acc: Any, operands: tuple[Any, ...], rows: list) -> None:
        """Adds operands (CHANNELS, depth) times the transposes of rows (columns, depth) to an accumulator."""
        for operand, x in zip(operands, rows, strict=True):
            if self.interpret and isinstance(operand, Array):
                # The interpreter has no wgmma with an operand in registers; it takes it from shared memory.
                def multiply_shared(shared, operand=operand, x=x):
                    shared[...] = operand
                    plgpu.wgmma(acc, shared, x.transpose((1, 0)))

                pl.run_scoped(multiply_shared, plgpu.SMEM(operand.shape, operand.dtype))
            else:
                plgpu.wgmma(acc, operand, x.transpose((1, 0)))

    def _start_scales(self, place: "_Place", scales: list, scratch: dict[str, Any]) -> None:
        """Starts to copy the split's group scales to shared memory."""
        groups, channels = self.split_groups, pl.ds(place.tile * CHANNELS, CHANNELS)
        split = pl.ds(place.split * groups, groups)
        index = (channels, split) if self.weights[0].contracted == 1 else (split, channels)
        for ref, copy in zip(scales, scratch["scales"], strict=True):
            plgpu.copy_gmem_to_smem(ref.at[index], copy, scratch["barrier"])

    def _group_scale(self, ref: Any, group: Array, output: int) -> Array:
        """Loads a group's scales of each channel of one output, float32 (CHANNELS,)."""
        if self.weights[0].contracted == 1:
            return load_column(ref, group, self.interpret)
        return split_scales(load_by_channel(ref.at[group]))[output]

    def _by_channel(self, values: Array) -> Array:
        return lax.broadcast_in_dim(values, (CHANNELS, self.columns), (0,))

    def _finish(self, place: "_Place", totals: list[Array], scales: list, largest: Any) -> list[Array]:
        """Combines the digits' columns, scales the totals and applies the activation."""
        outputs = []
        for number, total in enumerate(totals):
            total = combine_digits(total, largest, self.interpret)
            if self.weights[0].int4:
                total = total * (1 / INT4_FACTOR)
            if self.weights[0].group is None:
                w, output = divmod(number, self.num_outputs)
                stored = load_by_channel(scales[w].at[pl.ds(place.tile * CHANNELS, CHANNELS)])
                scale = stored.astype(jnp.float32) if self.num_outputs == 1 else split_scales(stored)[output]
                total = total * self._by_channel(scale)
            outputs.append(total)
        if self.activation is not None:
            gate, up = outputs
            outputs = [self.activation(gate) * up]
        return outputs


class _Job(NamedTuple):
    """A product of a weight's operands with the activations of one group.

    Attributes:
      weight, output, group: numbers of the weight, of its output, and of the group in the tile.
    """

    weight: int
    output: int
    group: int
    operands: tuple[Any, ...]
    rows: list


class _Place(NamedTuple):
    """A thread block's part: its expert, tile of channels and split of the contraction."""

    expert: Array
    tile: Array
    split: Array


def _block(ref: Any, number: int, depth: int) -> Any:
    """Returns a block of depth bytes along the contraction of activations (columns, bytes)."""
    return ref if ref.shape[1] == depth else ref.at[:, pl.ds(number * depth, depth)]
