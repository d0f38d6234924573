"""Experts for small batches on Hopper GPUs: reads each active expert's weights once, and no others.

Experts with int8 or int4 weights are computed by integer products (integer_experts.py), the others here. Output
channels are the 64 rows of a wgmma and tokens its 8 or more columns, so few columns are padding. A thread block
computes one tile of channels of one expert over its split of the contraction (accumulate.py). Channel scales are
applied outside.

Several thread blocks share a multiprocessor and hide each other's latency; the contraction is split if there would be
too few of them. XLA sums the splits and computes the activation and its product with up, small beside the weights.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.gpu import integer_experts, integer_weights
from dbrx_jax.kernels.gpu.accumulate import Block, accumulate_tile
from dbrx_jax.kernels.gpu.fixed_point import FixedPoint
from dbrx_jax.kernels.gpu.integer_weights import IntegerWeights
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, fits, pack, split_activations
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

MAX_TOKENS = 64
MIN_TOKENS = 8  # columns of a wgmma
MULTIPROCESSORS = 132  # of the SXM cards
MIN_BLOCKS = 3  # thread blocks per multiprocessor
_SHARED_BYTES = 56 * 1024  # shared memory per thread block, so that four fit a multiprocessor
_GRID = ("active_expert", "channel_tile", "split")  # in shard_map, names of mesh axes would refer to the mesh


class DecodeTiles(NamedTuple):
    """Tile sizes of the matmul with one matrix of each expert.

    Attributes:
      channels: packed elements of output channels per thread block, a multiple of 64.
      depth: packed elements along the contraction per pipeline step.
      steps: pipeline steps in flight.
      splits: parts of the contraction, each in a thread block of its own.
    """

    channels: int
    depth: int
    steps: int
    splits: int


def supports(x: Any, w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Returns whether :func:`decode_experts` supports these shapes and dtypes (arrays or shapes).

    On a GPU rows must be bfloat16; the interpreter also takes float32.
    """
    if not 1 <= x.shape[0] <= MAX_TOKENS or not (x.dtype == jnp.bfloat16 or interpret):
        return False
    weights = ((w1, 1), (v1, 1), (w2, 0))
    if any(isinstance(w, QuantizedArray) and w.kind != "fp8" for w, _ in weights):
        return x.dtype == jnp.bfloat16 and integer_experts.supports(w1, v1, w2)
    if not all(fits(w, contracted) and w.dtype == x.dtype for w, contracted in weights):
        return False
    gate, up, down = packed_shapes(w1, v1, w2)
    if (gate.kind, gate.bits.shape) != (up.kind, up.bits.shape):
        return False
    tokens = x.shape[0] + -x.shape[0] % MIN_TOKENS
    return bool(candidate_tiles((gate, up), tokens, 1)) and bool(candidate_tiles((down,), tokens, 1))


def rounded_for(w1: Weight, v1: Weight, w2: Weight) -> IntegerWeights | None:
    """Returns the weight for which one row is rounded to fixed point, or None if it is not rounded."""
    return integer_weights.pack(w1, 1) if integer_experts.supports(w1, v1, w2) else None


def packed_shapes(*weights: Weight) -> list[PackedWeights]:
    """Returns gate, up and down as :func:`pack` views them, as shapes."""
    return [jax.eval_shape(partial(pack, contracted=c), w) for w, c in zip(weights, (1, 1, 0), strict=True)]


def decode_experts(
    x: Float[Array, "N D"],
    active: Int[Array, "C"],
    num_active: Int[Array, ""],
    combine_weights: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: tuple[Any, Any] | None = None,
    fixed: FixedPoint | None = None,
    interpret: Any = None,
) -> Float[Array, "N D"]:
    """Computes active experts on all rows: the float32 sum over c of combine_weights[c] times expert active[c].

    A row with a weight of 0 gets exactly 0 from an expert, even if the expert's output is not finite.

    Args:
      x: up to MAX_TOKENS rows that :func:`supports` accepts.
      active: distinct active experts; entries from `num_active` on are ignored, and their weights not read.
      w1, v1, w2: stacked weights (E, F, D).
      activation: a key of ops.experts.ACTIVATIONS.
      tiles: of the matmuls with w1 and v1, and with w2: DecodeTiles, or IntegerTiles of int8 and int4 weights; by
        default those of the table or the rule.
      fixed: x in the format of :func:`rounded_for`, if it has been rounded.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.
    """
    is_active = jnp.arange(active.shape[0]) < num_active
    is_used = is_active[:, None] & (combine_weights != 0)
    if integer_experts.supports(w1, v1, w2):
        return integer_experts.integer_experts(
            x, active, num_active, is_used, combine_weights, w1, v1, w2, activation, tiles, fixed, interpret
        )
    active = jnp.where(is_active, active, 0)
    num_rows = x.shape[0]
    padded = jnp.pad(x, ((0, -num_rows % MIN_TOKENS), (0, 0)))
    gate_and_up, down = (pack(w1, 1), pack(v1, 1)), (pack(w2, 0),)
    if tiles is None:
        sizes = padded.shape[0], active.shape[0]
        tiles = default_tiles(gate_and_up, *sizes), default_tiles(down, *sizes)
    x_parts = split_activations(padded, gate_and_up[0])[None]
    gate, up = _multiply(x_parts, gate_and_up, active, num_active, tiles[0], interpret)
    inner = (ACTIVATIONS[activation](gate) * up).astype(x.dtype)  # (C, N, F)
    (y,) = _multiply(split_activations(inner, down[0]), down, active, num_active, tiles[1], interpret)
    # Selected, not multiplied by 0: outputs past num_active are uninitialised, and others may be infinite.
    return jnp.sum(jnp.where(is_used[:, :, None], y[:, :num_rows] * combine_weights[:, :, None], 0), axis=0)


def default_tiles(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> DecodeTiles:
    """Returns the table's tile sizes if they are valid, else the first candidate; for weights of one shape."""
    candidates = candidate_tiles(weights, tokens, experts)
    tuned = table().get(tiles_name(weights, tokens, experts))
    return next((t for t in candidates if list(t) == tuned), candidates[0])


def tiles_name(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> str:
    """Returns the key of these matmuls in the table of tile sizes."""
    w = weights[0]
    return name_of(f"experts_gpu {len(weights)} of {experts}", w.kind, None, (w.channels, w.depth), tokens)


def candidate_tiles(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> list[DecodeTiles]:
    """Returns tile sizes worth timing, the default first, with enough splits to keep every multiprocessor busy."""
    weight, candidates = weights[0], []
    for channels, depth in ((64, 64), (64, 32), (64, 128), (128, 64)):
        if weight.channels % channels or weight.depth % depth:
            continue
        step_bytes = 2 * depth * (len(weights) * channels + weight.num_inputs * tokens)
        steps = min(max(2, _SHARED_BYTES // step_bytes), 8)
        num_blocks, num_steps = experts * (weight.channels // channels), weight.depth // depth
        splits = [s for s in range(1, num_steps + 1) if num_steps % s == 0 and (s == 1 or num_steps // s >= 3)]
        enough = [s for s in splits if num_blocks * s >= MIN_BLOCKS * MULTIPROCESSORS] or splits[-1:]
        candidates += [DecodeTiles(channels, depth, steps, s) for s in enough[:2]]
    return candidates


def _multiply(
    x: Array, weights: tuple[PackedWeights, ...], active: Array, num_active: Array, tiles: DecodeTiles, interpret: Any
) -> list[Array]:
    """Multiplies by each weight of the active experts: float32 arrays (C, N, M), undefined from num_active on.

    Args:
      x: activations (C or 1, num_inputs, N, depth).
      weights: of one shape and kind.
    """
    sums = jnp.sum(_partial_sums(x, weights, active, num_active, tiles, interpret), axis=1)
    results = []
    for i, weight in enumerate(weights):
        y = jnp.moveaxis(sums[:, i], (1, 3), (3, 1)).reshape(sums.shape[0], sums.shape[4], -1)
        if weight.scale is not None:
            y = y * weight.scale[active].reshape(y.shape[0], 1, -1).astype(jnp.float32)
        results.append(y)
    return results


def _partial_sums(x, weights, active, num_active, tiles, interpret) -> Array:
    """Returns each split's sums (C, splits, num_weights, num_outputs, channels, N)."""
    weight, tokens = weights[0], x.shape[2]
    num_outputs = len(weights) * weight.num_outputs
    shape = (active.shape[0], tiles.splits, num_outputs, weight.channels, tokens)
    num_steps = weight.depth // tiles.depth // tiles.splits

    def body(num_active_ref, active_ref, x_ref, *refs):
        *bits, out, out_tile = refs
        c, channel_tile, split = (lax.axis_index(name) for name in _GRID)

        @pl.when(c < num_active_ref[0])
        def _():
            expert = active_ref[c]
            expert_x = x_ref.at[c if x_ref.shape[0] > 1 else 0]
            expert_bits = [r.at[expert] for r in bits]
            block = Block(weight, tiles, tokens, channel_tile, 0, split * num_steps, num_steps, bool(interpret))
            for i, total in enumerate(accumulate_tile(block, expert_bits, expert_x)):
                out_tile[i] = total
            plgpu.commit_smem()
            for i in range(num_outputs):
                channels = pl.ds(channel_tile * tiles.channels, tiles.channels)
                plgpu.copy_smem_to_gmem(out_tile.at[i], out.at[c, split, i, channels])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(active.shape[0], weight.channels // tiles.channels, tiles.splits),
        grid_names=_GRID,
        scratch_types=[plgpu.SMEM((num_outputs, tiles.channels, tokens), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    num_active = jnp.reshape(num_active, 1).astype(jnp.int32)
    sums = run(num_active, active.astype(jnp.int32), x, *(w.bits for w in weights))
    return sums.reshape(*shape[:2], len(weights), weight.num_outputs, *shape[3:])
