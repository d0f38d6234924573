"""Experts for small batches on Hopper GPUs: reads each active expert's weights once, and no others.

Output channels are the 64 rows of a wgmma and tokens its 8 or more columns, so no work is spent on padding tokens. A
block of 128 threads computes one tile of channels of one expert over its share of the contraction: TMA brings packed
weights (packed_weights.py) and activations into shared memory, registers dequantise to bfloat16, and wgmma sums in
float32. Plain weights go from shared memory straight into wgmma. Channel scales are applied outside, group scales to
each group's partial sum.

Several blocks share a multiprocessor and hide each other's latency; the contraction is split where there would be
too few. XLA sums the splits and computes gate, activation and up, which are small beside the weights.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.gpu.accumulate import Block, accumulate_tile
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, activations, fits, pack
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight

MAX_TOKENS = 64
MIN_TOKENS = 8  # columns of a wgmma
MULTIPROCESSORS = 132  # of the SXM cards


class DecodeTiles(NamedTuple):
    """Tile sizes of the matmul with one matrix of each expert.

    Attributes:
      channels: words of output channels in a block, a multiple of 64.
      depth: words along the contraction in a step: 64, or less where that does not divide it.
      steps: of weights and activations that are on their way at once.
      splits: shares of the contraction.
    """

    channels: int
    depth: int
    steps: int
    splits: int


def supports(x: Any, w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Returns whether :func:`decode_experts` supports these shapes and dtypes (arrays or shapes).

    On a GPU rows are bfloat16; float32 rows and plain weights are for interpreting alone.
    """
    if not 1 <= x.shape[0] <= MAX_TOKENS or not (x.dtype == jnp.bfloat16 or interpret):
        return False
    sides = ((w1, 1), (v1, 1), (w2, 0))
    if not all(fits(w, c) for w, c in sides) or w1.dtype != v1.dtype or x.dtype != w1.dtype or x.dtype != w2.dtype:
        return False
    up, other, down = (jax.eval_shape(partial(pack, contracted=c), w) for w, c in sides)
    tokens = x.shape[0] + -x.shape[0] % MIN_TOKENS
    alike = (up.kind, up.group, up.bits.shape) == (other.kind, other.group, other.bits.shape)
    return alike and bool(candidate_tiles((up, other), tokens, 1)) and bool(candidate_tiles((down,), tokens, 1))


def decode_experts(
    x: Float[Array, "N D"],
    chosen: Int[Array, "C"],
    count: Int[Array, ""],
    combine_weights: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: tuple[DecodeTiles, DecodeTiles] | None = None,
    interpret: Any = None,
) -> Float[Array, "N D"]:
    """The float32 sum over c < count of combine_weights[c] times expert chosen[c], a gated MLP, on all rows.

    A row with a weight of 0 gets exactly 0 from an expert, whatever it holds. From `count` on no weight is read.

    Args:
      x: up to MAX_TOKENS rows that :func:`supports` takes.
      chosen: active experts, each once; entries from `count` on are ignored.
      w1, v1, w2: stacked, (E, F, D) each.
      activation: of ops.experts.ACTIVATIONS.
      tiles: of gate and up, and of down; :func:`default_tiles` otherwise.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.
    """
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, -rows % MIN_TOKENS), (0, 0)))
    here = jnp.arange(chosen.shape[0]) < count
    chosen = jnp.where(here, chosen, 0)
    up, down = (pack(w1, 1), pack(v1, 1)), (pack(w2, 0),)
    if tiles is None:
        tokens, places = padded.shape[0], chosen.shape[0]
        tiles = default_tiles(up, tokens, places), default_tiles(down, tokens, places)
    gate, other = products(activations(padded, up[0])[None], up, chosen, count, tiles[0], interpret)
    inner = (ACTIVATIONS[activation](gate) * other).astype(x.dtype)  # (C, N, F)
    (y,) = products(activations(inner, down[0]), down, chosen, count, tiles[1], interpret)
    y = y[:, :rows]
    # Chosen, not multiplied by 0: other rows may hold anything, and what is past the count was never written.
    used = here[:, None] & (combine_weights != 0)
    return jnp.sum(jnp.where(used[:, :, None], y * combine_weights[:, :, None], 0), axis=0)


def default_tiles(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> DecodeTiles:
    """The table's, else tiles that fill the multiprocessors, for weights of one shape that are read together."""
    candidates = candidate_tiles(weights, tokens, experts)
    found = table().get(tiles_name(weights, tokens, experts))
    return DecodeTiles(*found) if found is not None and DecodeTiles(*found) in candidates else candidates[0]


def tiles_name(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> str:
    """Name of these matmuls in the table of tile sizes."""
    w = weights[0]
    kernel = f"experts_gpu {len(weights)} of {experts}"
    return name_of(kernel, w.kind, w.group, (w.channels, w.depth), tokens)


def candidate_tiles(weights: tuple[PackedWeights, ...], tokens: int, experts: int) -> list[DecodeTiles]:
    """Tile sizes worth timing, the default first: with splits that leave no multiprocessor idle."""
    weight, found = weights[0], []
    for channels, depth in ((64, 64), (64, 32), (64, 128), (128, 64)):
        if weight.channels % channels or weight.depth % depth or depth % weight.period:
            continue
        step = 2 * depth * (len(weights) * channels + weight.inputs * tokens)
        steps = min(max(2, _SHARED_BYTES // step), 8)
        blocks, total = experts * (weight.channels // channels), weight.depth // depth
        splits = [s for s in range(1, total + 1) if total % s == 0 and (s == 1 or total // s >= 3)]
        enough = [s for s in splits if blocks * s >= _BLOCKS_EACH * MULTIPROCESSORS] or splits[-1:]
        found += [DecodeTiles(channels, depth, steps, s) for s in enough[:2]]
    return found


# Shared memory of one block, for about four on a multiprocessor, and how many of them there should be at least.
_SHARED_BYTES = 56 * 1024
_BLOCKS_EACH = 3


def products(
    x: Array, weights: tuple[PackedWeights, ...], chosen: Array, count: Array, tiles: DecodeTiles, interpret: Any
) -> list[Array]:
    """Every chosen expert's products (C, N, M) with each weight, in float32, of activations (C or 1, inputs, N, depth).

    The weights are alike. What belongs to experts from `count` on is undefined.
    """
    sums = jnp.sum(_partial_sums(x, weights, chosen, count, tiles, interpret), axis=1)  # (C, W, outputs, channels, N)
    found = []
    for i, weight in enumerate(weights):
        y = jnp.moveaxis(sums[:, i], (1, 3), (3, 1)).reshape(sums.shape[0], sums.shape[4], -1)
        if weight.scale is not None:
            y = y * weight.scale[chosen].reshape(y.shape[0], 1, -1).astype(jnp.float32)
        found.append(y)
    return found


def _partial_sums(x, weights, chosen, count, tiles, interpret) -> Array:
    """(C, splits, W, outputs, channels, N): the sums of every share of the contraction."""
    weight, tokens = weights[0], x.shape[2]
    outputs = len(weights) * weight.outputs
    shape = (chosen.shape[0], tiles.splits, outputs, weight.channels, tokens)
    steps = weight.depth // tiles.depth // tiles.splits
    scales = [w.groups for w in weights if w.groups is not None]

    def body(count_ref, chosen_ref, x_ref, *refs):
        bits, scale_refs, (out, out_tile) = refs[: len(weights)], refs[len(weights) : -2], refs[-2:]
        c, m, s = (lax.axis_index(name) for name in _GRID)

        @pl.when(c < count_ref[0])
        def _():
            expert = chosen_ref[c]
            planes_ref = x_ref.at[c if x_ref.shape[0] > 1 else 0]
            block = Block(weight, tiles, tokens, m, 0, s * steps, steps, bool(interpret))
            block_scales = [r.at[expert] for r in scale_refs]
            totals = accumulate_tile(block, [r.at[expert] for r in bits], block_scales, planes_ref)
            for i, total in enumerate(totals):
                out_tile[i] = total
            plgpu.commit_smem()
            for i in range(outputs):
                plgpu.copy_smem_to_gmem(out_tile.at[i], out.at[c, s, i, pl.ds(m * tiles.channels, tiles.channels)])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(chosen.shape[0], weight.channels // tiles.channels, tiles.splits),
        grid_names=_GRID,
        scratch_types=[plgpu.SMEM((outputs, tiles.channels, tokens), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    sums = run(
        jnp.reshape(count, 1).astype(jnp.int32), chosen.astype(jnp.int32), x, *(w.bits for w in weights), *scales
    )
    return sums.reshape(*shape[:2], len(weights), weight.outputs, *shape[3:])


# Not the names of a mesh's axes: inside shard_map those would be asked for instead.
_GRID = ("place", "channels", "share")


class Traffic(NamedTuple):
    """Bytes that a call's kernels copy.

    Attributes:
      weights: read, each chosen expert's once.
      scales: by group, likewise. Those by channel are XLA's.
      activations: read by every block again, after the first time from the cache.
      written: sums in float32, which XLA reads again.
    """

    weights: int
    scales: int
    activations: int
    written: int


def decode_bytes(
    x: Any,
    chosen: Any,
    count: int,
    w1: Weight,
    v1: Weight,
    w2: Weight,
    tiles: tuple[DecodeTiles, DecodeTiles] | None = None,
) -> Traffic:
    """Bytes that :func:`decode_experts` copies for `count` experts (arrays or shapes)."""
    tokens = x.shape[0] + -x.shape[0] % MIN_TOKENS
    up, down = (jax.eval_shape(partial(pack, contracted=c), w) for w, c in ((w1, 1), (w2, 0)))
    if tiles is None:
        places = chosen.shape[0]
        tiles = default_tiles((up, up), tokens, places), default_tiles((down,), tokens, places)
    total = [0, 0, 0, 0]
    for weight, matrices, t in ((up, 2, tiles[0]), (down, 1, tiles[1])):
        itemsize = weight.bits.dtype.itemsize
        rows = weight.inputs * tokens * weight.depth * x.dtype.itemsize
        total[0] += matrices * weight.channels * weight.depth * itemsize
        total[1] += matrices * weight.groups.size // weight.groups.shape[0] * 4 if weight.group else 0
        total[2] += weight.channels // t.channels * rows
        total[3] += t.splits * matrices * weight.outputs * weight.channels * tokens * 4
    return Traffic(*(count * n for n in total))
