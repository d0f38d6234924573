"""Memory layout that the TPU compiler gives to the arrays of the key-value cache."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def is_stored_by_head(heads: int, dtype: DTypeLike) -> bool:
    """Returns whether a TPU stores an array (B, S, G, K) in memory as (B, G, S, K).

    It does if the G heads of a position do not fill 4 bytes. It always does for the scales of an int8 cache.
    """
    return heads * jnp.dtype(dtype).itemsize < 4
