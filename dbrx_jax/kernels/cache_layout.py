"""The memory layout that the TPU's compiler gives to arrays of the key-value cache."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def is_stored_by_head(heads: int, dtype: DTypeLike) -> bool:
    """Returns whether a TPU stores an array (B, S, G, K) in memory as (B, G, S, K).

    It does where the G heads of a position do not fill 4 bytes; the int8 cache's scales it always stores so.
    """
    return heads * jnp.dtype(dtype).itemsize < 4
