"""Checks of token ids and masks from callers."""

from typing import Any

import jax
import numpy as np
from jax import Array

from dbrx_jax.errors import GenerationError


def check_ids(input_ids: Any, vocab_size: int) -> Array | np.ndarray:
    """Converts token ids to an integer array (B, T).

    Raises:
      GenerationError: they are not integers in two dimensions, or (outside of jit) not all in the vocabulary.
    """
    ids = _array("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise GenerationError(f"input_ids: expected integers of shape (batch, tokens), got {ids.dtype} {ids.shape}")
    if isinstance(ids, np.ndarray) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise GenerationError(f"input_ids: expected ids from 0 to {vocab_size - 1} (the model's vocabulary), got {bad}")
    return ids


def _array(name: str, value: Any) -> Array | np.ndarray:
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise GenerationError(f"{name}: its rows have different lengths; pad them") from None


def same_shape(name: str, value: Any, ids: Array | np.ndarray) -> Array | np.ndarray:
    """Converts a value to an array and checks that it has the shape of the token ids."""
    array = _array(name, value)
    if array.shape != ids.shape:
        raise GenerationError(f"{name}: expected the shape of input_ids {ids.shape}, got {array.shape}")
    return array
