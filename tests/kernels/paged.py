"""Makes paged caches of contiguous ones, for tests."""

import jax.numpy as jnp
import numpy as np


def paged(arrays, block, seed=0, spare=np.nan):
    """Splits arrays (R, G, S, …) into blocks in random order; returns the pools (N, G, block, …) and the table (R, W).

    Two blocks belong to no row, the first of all among them; they hold the value `spare`.
    """
    arrays = [np.asarray(a) for a in arrays]
    rows, heads, positions = arrays[0].shape[:3]
    width = positions // block
    order = np.random.default_rng(seed).permutation(rows * width + 1)
    table = 1 + order[: rows * width].reshape(rows, width).astype(np.int32)
    pools = []
    for array in arrays:
        value = 9 if np.issubdtype(array.dtype, np.integer) else spare
        pool = np.full((rows * width + 2, heads, block, *array.shape[3:]), value, array.dtype)
        pool[table] = array.reshape(rows, heads, width, block, *array.shape[3:]).swapaxes(1, 2)
        pools.append(jnp.asarray(pool))
    return pools, table
