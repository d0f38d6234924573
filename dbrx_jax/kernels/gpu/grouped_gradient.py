"""Gradient of a grouped matmul's weights on Hopper GPUs: out^T rows, for each group of rows.

A thread block computes one tile of one group's matrix over the group's rows. The first and last row tile of a group may
contain rows of other groups, which are replaced by zeros in shared memory; multiplying by 0 would keep infinities.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

_GRID = ("group", "m", "c")


class GradientTiles(NamedTuple):
    """Tile sizes: rows per pipeline step, tile (m, c) of the matrix per thread block, and pipeline steps in flight."""

    rows: int = 64
    m: int = 128
    c: int = 128
    steps: int = 4


def gradient_tiles(m: int, c: int) -> list[GradientTiles]:
    """Returns tile sizes worth timing for a matrix (M, C), the default first; none if it is not supported."""
    sizes = (GradientTiles(), GradientTiles(64, 128, 256, 3), GradientTiles(64, 64, 128), GradientTiles(64, 64, 64))
    return [t for t in sizes if m % t.m == 0 and c % t.c == 0]


def gradient_supports(out: Any, rows: Any, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_gradient` supports these shapes and dtypes (arrays or shapes)."""
    if out.dtype != rows.dtype or not (rows.dtype == jnp.bfloat16 or interpret):
        return False
    return bool(gradient_tiles(out.shape[1], rows.shape[1]))


def grouped_gradient(
    out: Float[Array, "P M"],
    rows: Float[Array, "P C"],
    sizes: Int[Array, "E"],
    tiles: GradientTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "E M C"]:
    """Computes out^T rows of each group, accumulated in float32 and rounded once; zeros for an empty group.

    Rows past the sum of sizes belong to no group.
    """
    t = tiles or gradient_tiles(out.shape[1], rows.shape[1])[0]
    padding = ((0, -rows.shape[0] % t.rows), (0, 0))
    out, rows = jnp.pad(out, padding), jnp.pad(rows, padding)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    starts = (ends - sizes).astype(jnp.int32)
    num_tiles = rows.shape[0] // t.rows

    def body(starts_ref, ends_ref, out_ref, rows_ref, result, tile):
        group, m, c = (lax.axis_index(name) for name in _GRID)
        start, end = starts_ref[group], ends_ref[group]
        first_tile = lax.div(start, t.rows)
        num_steps = jnp.where(end > start, lax.div(end + t.rows - 1, t.rows) - first_tile, 0)

        def scope(acc):
            def step(index, left, right):
                tile_start = (first_tile + index[0]) * t.rows

                @pl.when((tile_start < start) | (tile_start + t.rows > end))
                def _():
                    for ref in (left, right):
                        ref[...] = _zero_other_rows(ref[...], start - tile_start, end - tile_start)
                    plgpu.commit_smem()

                plgpu.wgmma(acc, left.transpose((1, 0)), right)
                plgpu.wgmma_wait(0)

            @pl.when(num_steps > 0)
            def _():
                plgpu.emit_pipeline(
                    step,
                    grid=(num_steps,),
                    in_specs=[
                        plgpu.BlockSpec((t.rows, t.m), lambda k: (first_tile + k, m)),
                        plgpu.BlockSpec((t.rows, t.c), lambda k: (first_tile + k, c)),
                    ],
                    max_concurrent_steps=min(t.steps, num_tiles),
                )(out_ref, rows_ref)

            return acc[...]

        tile[...] = pl.run_scoped(scope, plgpu.ACC((t.m, t.c))).astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, result.at[group, pl.ds(m * t.m, t.m), pl.ds(c * t.c, t.c)])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((sizes.shape[0], out.shape[1], rows.shape[1]), rows.dtype),
        grid=(sizes.shape[0], out.shape[1] // t.m, rows.shape[1] // t.c),
        grid_names=_GRID,
        scratch_types=[plgpu.SMEM((t.m, t.c), rows.dtype)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return run(starts, ends, out, rows)


def _zero_other_rows(tile: Array, start: Array, end: Array) -> Array:
    """Replaces a tile's rows before `start` and from `end` on by zeros."""
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, tile.shape, 0), plgpu.Layout.WGMMA)
    return jnp.where((row >= start) & (row < end), tile, jnp.zeros_like(tile))
