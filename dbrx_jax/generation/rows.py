"""Reads and writes rows of arrays by the numbers of their slots."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int


def take_rows(array: ArrayLike, slots: Int[Array, "R"]) -> Array:
    """Returns the rows of an array with these numbers, or its only row, which then is for all."""
    array = jnp.asarray(array)
    return array if array.shape[0] == 1 else array.at[slots].get(mode="clip")


def put_rows(array: Array, slots: Int[Array, "R"], rows: Array) -> Array:
    """Returns the array with other rows at these numbers; numbers past its end are dropped."""
    return array.at[slots].set(rows, mode="drop", unique_indices=True)
