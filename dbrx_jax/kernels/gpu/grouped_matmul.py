"""Grouped matmul on Hopper GPUs: each row times the weight of its group, for many rows sorted by group.

Plain weights go through JAX's ragged_dot for Hopper, or with :class:`GroupedTiles` through our kernel
(grouped_quantized.py). Quantised weights always use ours, which unpacks them in registers, so that the whole weight
never exists in bfloat16.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jaxtyping import Float, Int

from dbrx_jax.kernels.gpu import grouped_quantized
from dbrx_jax.kernels.gpu.grouped_quantized import GroupedTiles
from dbrx_jax.kernels.gpu.packed_weights import PackedWeights, fits, pack
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.linear import Weight


class PlainTiles(NamedTuple):
    """Tile sizes of a grouped matmul with plain weights, the parameters of JAX's ragged_dot for Hopper.

    Attributes:
      rows, channels, depth: tile sizes of a thread block in a pipeline step.
      steps: pipeline steps in flight.
      band: channel tiles that pass over all rows together.
    """

    rows: int = 128
    channels: int = 128
    depth: int = 64
    steps: int = 4
    band: int = 8


def supports(rows: Any, weight: Weight, contracted: int, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_matmul` supports these shapes and dtypes (arrays or shapes)."""
    if rows.dtype != weight.dtype or not (rows.dtype == jnp.bfloat16 or interpret) or not fits(weight, contracted):
        return False
    return bool(candidate_tiles(weight, contracted))


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    contracted: int,
    sizes: Int[Array, "E"],
    tiles: GroupedTiles | PlainTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "P M"]:
    """Multiplies each row by its group's matrix, in the rows' dtype, accumulated in float32.

    Args:
      rows: sorted by group; rows past the sum of sizes give 0, even if they are not finite.
      weight: one that :func:`supports` accepts, (E, M, C) with contracted 1 or (E, C, M) with contracted 0.
      sizes: number of rows of each group, possibly 0.
      tiles: PlainTiles for a plain weight, else GroupedTiles; :func:`default_tiles` by default.
      interpret: parameters of Pallas' interpreter for GPUs, to run on a CPU.
    """
    packed = pack(weight, contracted)
    tiles = tiles or default_tiles(rows, weight, contracted)
    multiply: Callable[..., Array] = _plain if isinstance(tiles, PlainTiles) else grouped_quantized.multiply
    y = multiply(rows, packed, sizes, tiles, interpret)[: rows.shape[0]]
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], y, 0).astype(rows.dtype)


def default_tiles(rows: Any, weight: Weight, contracted: int) -> GroupedTiles | PlainTiles:
    """Returns the table's tile sizes if they are valid, else the first candidate."""
    candidates: list[Any] = candidate_tiles(weight, contracted)
    tuned = table().get(tiles_name(rows, weight, contracted))
    return next((t for t in candidates if list(t) == tuned), candidates[0])


def tiles_name(rows: Any, weight: Weight, contracted: int) -> str:
    """Returns the key of a matmul in the table of tile sizes, by the mean number of rows per expert."""
    w = jax.eval_shape(partial(pack, contracted=contracted), weight)
    rows_per_expert = math.ceil(rows.shape[0] / weight.shape[0])
    return name_of(f"grouped_gpu {contracted}", w.kind, w.group_depth, (w.channels, w.depth), rows_per_expert)


def candidate_tiles(weight: Weight, contracted: int) -> list[GroupedTiles | PlainTiles]:
    """Returns tile sizes worth timing, the default first; none if the weight's sizes are not supported."""
    packed = jax.eval_shape(partial(pack, contracted=contracted), weight)
    jax_tiles = [t for t in itertools.starmap(PlainTiles, _JAX_PLAIN) if _plain_is_valid(packed, t)]
    sizes = _PLAIN if packed.kind == "plain" else _ONE_OUTPUT if packed.num_outputs == 1 else _TWO_OUTPUTS
    own_tiles = [t for t in itertools.starmap(GroupedTiles, sizes) if grouped_quantized.is_valid(packed, t)]
    return [*jax_tiles, *own_tiles] if packed.kind == "plain" else [*own_tiles]


def _plain_is_valid(weight: PackedWeights, t: PlainTiles) -> bool:
    """Returns whether tiles divide a weight and fit the shared memory."""
    shared_bytes = 2 * t.steps * t.depth * (t.channels + t.rows) + 2 * t.rows * t.channels
    divides = weight.channels % t.channels == 0 and weight.depth % t.depth == 0
    return divides and shared_bytes <= grouped_quantized.SHARED_BYTES


# The first that is valid is the default, the last ones are for small shapes.
# Rows, channels, depth, steps.
_JAX_PLAIN = ((128, 128, 64, 4), (128, 256, 64, 3), (64, 256, 64, 4), (64, 64, 64, 4))
# Rows, channels, depth, weight slots, row slots, band.
_PLAIN = ((128, 256, 64, 4, 4), (256, 128, 64, 3, 3), (192, 128, 64, 4, 4))
_ONE_OUTPUT = (
    (128, 256, 64, 3, 6),
    (128, 256, 64, 3, 6, 16),
    (256, 128, 64, 2, 4),
    (192, 128, 64, 3, 5),
    (128, 128, 64, 4, 8),
    (128, 64, 64, 4, 4),
    (128, 64, 32, 4, 4),
)
_TWO_OUTPUTS = (
    (128, 128, 64, 5, 5),
    (128, 128, 64, 5, 5, 16),
    (64, 128, 64, 6, 8),
    (128, 64, 64, 4, 4),
    (128, 64, 32, 4, 4),
)


def _plain(rows: Array, weight: PackedWeights, sizes: Array, tiles: PlainTiles, interpret: Any) -> Array:
    """Multiplies by plain weights with JAX's kernel; rows in no group are undefined."""
    padded = jnp.pad(rows, ((0, -rows.shape[0] % tiles.rows), (0, 0)))
    mosaic: Any = plgpu  # mypy also checks with jax 0.10, which has no interpreter
    with mosaic.force_gpu_interpret_mode(interpret) if interpret else nullcontext():
        return ragged_dot(
            padded,
            weight.bits,
            group_sizes=sizes.astype(jnp.int32),
            block_m=tiles.rows,
            block_n=tiles.channels,
            block_k=tiles.depth,
            max_concurrent_steps=tiles.steps,
            grid_block_n=tiles.band,
            transpose_rhs=weight.contracted == 1,
        )


def grouped_bytes(
    rows: Any, weight: Weight, contracted: int, sizes: Sequence[int], tiles: GroupedTiles | PlainTiles | None = None
) -> tuple[int, int]:
    """Returns the bytes that :func:`grouped_matmul`'s kernel reads, mostly from the L2 cache, and writes."""
    packed = jax.eval_shape(partial(pack, contracted=contracted), weight)
    tiles = tiles or default_tiles(rows, weight, contracted)
    if isinstance(tiles, PlainTiles):  # JAX's kernel also computes pairs without rows
        heights = [tiles.rows] * (-(-rows.shape[0] // tiles.rows) + len(sizes) - 1)
    else:
        heights = grouped_quantized.tile_heights(sizes, rows.shape[0], tiles.rows)
    weight_bytes = packed.channels * packed.depth * packed.bits.dtype.itemsize
    row_bytes = packed.num_inputs * packed.depth * rows.dtype.itemsize * (packed.channels // tiles.channels)
    read = len(heights) * weight_bytes + sum(heights) * row_bytes
    return read, sum(sizes) * weight.shape[2 - contracted] * rows.dtype.itemsize
