"""Rows of a batch in tiles of one size, so that what is computed for a row does not depend on how many there are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

ROW_TILE = 8  # rows


def map_row_tiles(
    function: Callable[..., tuple[Any, Any]], arrays: Any, carry: Any, count: Int[Array, ""]
) -> tuple[Any, Any]:
    """Calls function(first row, rows of the arrays, carry) for each tile; returns its results for all rows, and carry.

    Args:
      function: gives arrays of ROW_TILE rows, and the carry for the next tile.
      arrays: a tree of arrays (B, …), B a multiple of ROW_TILE.
      count: B / ROW_TILE as :func:`num_row_tiles` gives it.
    """

    def rows(i: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * ROW_TILE, ROW_TILE), arrays)

    shapes, _ = jax.eval_shape(lambda c: function(jnp.int32(0), rows(jnp.int32(0)), c), carry)
    total = jax.tree.leaves(arrays)[0].shape[0]

    def one(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        results, carry = state
        new, carry = function(i * ROW_TILE, rows(i), carry)
        put = jax.tree.map(lambda a, n: lax.dynamic_update_slice_in_dim(a, n, i * ROW_TILE, 0), results, new)
        return put, carry

    empty = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), shapes)
    return lax.fori_loop(0, count, one, (empty, carry))


def num_row_tiles(rows: int, positions: Int[Array, "..."]) -> Int[Array, ""]:
    """Number of row tiles, as a value unknown to XLA, which would otherwise unroll a single tile,
    and compile it otherwise than several. Positions are never below 0."""
    return rows // ROW_TILE + jnp.min(positions, initial=0)
