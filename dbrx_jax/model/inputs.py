"""Checks of token ids and masks from callers."""

from collections.abc import Mapping
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
        raise GenerationError(
            f"input_ids: expected integers of shape (batch, tokens), got {_described(input_ids, ids)}"
        )
    if isinstance(ids, np.ndarray) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise GenerationError(f"input_ids: expected ids from 0 to {vocab_size - 1} (the model's vocabulary), got {bad}")
    return ids


def pad_rows(input_ids: Any, attention_mask: Any, pad_token_id: int, left: bool) -> tuple[Any, Any]:
    """Pads lists of token ids of unequal length, and their attention mask; returns both, or what is given.

    Args:
      attention_mask: lists of the same lengths, as a tokenizer gives them, or None: all ones.

    Raises:
      GenerationError: a row is no list of token ids, or is empty, or its mask has another length.
    """
    if not isinstance(input_ids, list | tuple) or not all(hasattr(row, "__len__") for row in input_ids):
        return input_ids, attention_mask
    lengths = [len(row) for row in input_ids]
    if len(set(lengths)) < 2:
        return input_ids, attention_mask
    if 0 in lengths:
        raise GenerationError(f"input_ids: row {lengths.index(0)} is empty; a prompt needs at least one token")
    ids = np.full((len(lengths), max(lengths)), pad_token_id, np.int64)
    mask = np.zeros(ids.shape, np.int32)
    if attention_mask is not None and len(attention_mask) != len(lengths):
        raise GenerationError(f"attention_mask: expected {len(lengths)} rows, got {len(attention_mask)}")
    for i, (row, length) in enumerate(zip(input_ids, lengths, strict=True)):
        columns = slice(max(lengths) - length, None) if left else slice(length)
        values = np.asarray(row)
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise GenerationError(f"input_ids: row {i}: expected token ids, got {values.dtype} {values.shape}")
        row_mask = np.ones(length) if attention_mask is None else np.asarray(attention_mask[i])
        if row_mask.shape != values.shape:
            raise GenerationError(f"attention_mask: row {i}: expected {length} values, got {row_mask.shape}")
        ids[i, columns], mask[i, columns] = values, row_mask
    return ids, mask


def _described(value: Any, array: Array | np.ndarray) -> str:
    """Returns what was given instead of token ids, with what to do if it is a usual mistake."""
    if isinstance(value, str) or array.dtype.kind == "U":
        return "text; a tokenizer makes ids of it"
    if isinstance(value, Mapping):
        return "a dictionary; write ** before it"
    if array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.integer):
        return f"a single row {array.shape}; write [ids]"
    return f"{array.dtype} {array.shape}"


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
