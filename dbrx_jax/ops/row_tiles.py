"""Row tiles: a batch computed ROW_TILE rows at a time, so that a row's bits do not depend on the number of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

ROW_TILE = 8  # rows


def pad_rows(x: Float[Array, "R *rest"], rows: int) -> Float[Array, "P *rest"]:
    """Appends zeros up to a number of rows, if there are fewer."""
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), *[(0, 0)] * (x.ndim - 1)))


def map_row_tiles(
    function: Callable[..., tuple[Any, Any]], arrays: Any, carry: Any, count: Int[Array, ""]
) -> tuple[Any, Any]:
    """Calls function(first row, rows of the arrays, carry) on each tile; returns the results of all rows and carry.

    Args:
      function: returns a tree of arrays with ROW_TILE rows, and the carry for the next tile.
      arrays: a tree of arrays (B, …), B a multiple of ROW_TILE.
      count: the number of tiles, from :func:`num_row_tiles`.
    """

    def tile_rows(i: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * ROW_TILE, ROW_TILE), arrays)

    shapes, _ = jax.eval_shape(lambda c: function(jnp.int32(0), tile_rows(jnp.int32(0)), c), carry)
    num_rows = jax.tree.leaves(arrays)[0].shape[0]

    def run_tile(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        results, carry = state
        new, carry = function(i * ROW_TILE, tile_rows(i), carry)
        put = jax.tree.map(lambda a, n: lax.dynamic_update_slice_in_dim(a, n, i * ROW_TILE, 0), results, new)
        return put, carry

    empty = jax.tree.map(lambda s: jnp.zeros((num_rows, *s.shape[1:]), s.dtype), shapes)
    return lax.fori_loop(0, count, run_tile, (empty, carry))


def num_row_tiles(rows: int, positions: Int[Array, "..."]) -> Int[Array, ""]:
    """Returns rows / ROW_TILE as a value that XLA does not know; it would unroll a single tile, and compile it
    differently from several. Positions are never negative, so their minimum with 0 adds 0."""
    return rows // ROW_TILE + jnp.min(positions, initial=0)
