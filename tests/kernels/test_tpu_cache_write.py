"""Tests of the TPU cache write kernel, interpreted on the CPU, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tpu.cache_write import write_positions, write_scales
from dbrx_jax.model.cache import LayerCache, swap_layout, write_cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_write_positions_skips_positions_out_of_range(dtype):
    rng = np.random.default_rng(0)
    cache, new = rng.integers(-9, 9, (5, 6, 2, 128)), rng.integers(-9, 9, (3, 2, 128))
    rows, positions = np.array([1, 4, 2]), np.array([0, 6, 5])  # the second position is on another device
    want = cache.copy()
    want[1, 0], want[2, 5] = new[0], new[2]
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(write_positions)(jnp.asarray(cache, dtype), jnp.asarray(new, dtype), rows, positions)
    np.testing.assert_array_equal(np.asarray(out, np.int64), want)


def test_write_scales_changes_one_position_of_a_block():
    rng = np.random.default_rng(0)
    pool, new = rng.integers(-9, 9, (5, 2, 128)), rng.integers(-9, 9, (3, 2))
    blocks, offsets = np.array([1, 4, 2]), np.array([0, 128, 77])  # the second position is on another device
    want = pool.copy()
    want[1, :, 0], want[2, :, 77] = new[0], new[2]
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(write_scales)(jnp.asarray(pool, jnp.bfloat16), jnp.asarray(new, jnp.bfloat16), blocks, offsets)
    np.testing.assert_array_equal(np.asarray(out, np.int64), want)


@pytest.mark.parametrize("int8", [False, True])
def test_tpu_write_cache_matches_scatter(int8):
    """Eight heads, context_shard 1 of 2, blocks in any order; platform="tpu" selects the kernel."""
    rng = np.random.default_rng(1)
    shape, scales = (6, 8, 16, 128), [jnp.zeros((6, 8, 16), jnp.bfloat16)] * 2 if int8 else []
    cache = LayerCache(*[jnp.zeros(shape, "int8" if int8 else "float32")] * 2, *scales)
    key, value = (jnp.asarray(rng.normal(size=(3, 1, 8, 128)), jnp.float32) for _ in range(2))
    positions, valid, table = jnp.array([[3], [4], [61]]), jnp.ones((3, 1), bool), jnp.array([[3, 0], [1, 2], [5, 4]])
    arrays = key, value, valid, positions, table, (1, 2)
    want = write_cache(cache, *arrays)
    with pltpu.force_tpu_interpret_mode():
        tpu_cache = swap_layout(cache, "tpu")
        actual = swap_layout(write_cache(swap_layout(tpu_cache, "tpu"), *arrays, platform="tpu"), "tpu")
    for a, b in zip(swap_layout(actual, "tpu"), want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.argwhere(np.asarray(want.key).any(axis=(1, 3))).tolist() == [[3, 1], [4, 14]]
