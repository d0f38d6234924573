"""Tests of the TPU grouped matmul, interpreted on the CPU, against one matmul per group in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.tpu.grouped_matmul import (
    GroupedTiles,
    default_tiles,
    grouped_bytes,
    grouped_gradient,
    grouped_grid,
    grouped_matmul,
    grouped_operands,
    grouped_steps,
    supports,
    tile_candidates,
    vmem_bytes,
)
from dbrx_jax.kernels.tpu.packed_weights import WeightFormat
from tests.kernels.test_tpu_decode_experts import BOUNDS, FORMATS, assert_close, fetched_bytes, random_rows
from tests.kernels.weights import FAST_COMPILE, shape_of, to_float32, weight_of

pytestmark = pytest.mark.slow  # .ci/run also runs it with the newest JAX

SIZES = ([70, 0, 57, 100], [0, 0, 0, 0], [0, 250, 0, 0], [128, 0, 128, 0], [1, 2, 0, 3], [250])


product = jax.jit(grouped_matmul, static_argnames=("contracted", "tiles", "interpret"), compiler_options=FAST_COMPILE)
gradient = jax.jit(grouped_gradient, static_argnames="interpret", compiler_options=FAST_COMPILE)


def weights(fmt, dtype, contracted, experts, c=512, m=384):
    return weight_of((experts, m, c) if contracted else (experts, c, m), fmt, contracted, dtype)


def slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def reference(rows, weight, contracted, sizes):
    rows, weight = np.asarray(rows.astype(jnp.float32)), to_float32(weight)
    y = np.zeros((len(rows), weight.shape[1 if contracted else 2]), np.float32)
    for group, w in zip(slices(sizes), weight, strict=True):
        y[group] = rows[group] @ (w.T if contracted else w)
    return y


def run(rows, weight, contracted, sizes, tiles=None):
    assert supports(rows, weight, contracted)
    y = product(rows, weight, contracted=contracted, sizes=jnp.asarray(sizes), tiles=tiles, interpret=True)
    assert y.dtype == rows.dtype
    return y


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        *((f, jnp.float32) for f in FORMATS if f != "int4-32"),
        pytest.param("int4-32", jnp.float32, marks=pytest.mark.slow),
        ("plain", jnp.bfloat16),
        ("int4-128", jnp.bfloat16),
    ],
)
def test_grouped_matmul_matches_reference(fmt, contracted, dtype):
    rows, weight = random_rows(260, 512, dtype), weights(fmt, dtype, contracted, 4)
    y = run(rows, weight, contracted, SIZES[0], GroupedTiles(128, 128))
    assert_close(y, reference(rows, weight, contracted, SIZES[0]), dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_matmul_handles_empty_and_uneven_groups(sizes):
    """Rows past the last group belong to no group."""
    rows, weight = random_rows(256, 256), weights("int8", jnp.float32, 1, len(sizes), 256)
    y = run(rows.at[sum(sizes) :].set(np.nan), weight, 1, sizes)
    assert_close(y, reference(rows, weight, 1, sizes), jnp.float32)
    assert not np.asarray(y)[sum(sizes) :].any()


@given(st.data())
@settings(max_examples=3)
def test_random_groups_match_reference(data):
    sizes = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=6))
    rows = random_rows(sum(sizes) + data.draw(st.integers(1, 200)), 256)
    contracted, m = data.draw(st.integers(0, 1)), data.draw(st.sampled_from((128, 320, 640)))
    weight = weights(data.draw(st.sampled_from(("plain", "int8"))), jnp.float32, contracted, len(sizes), 256, m)
    y = run(rows, weight, contracted, sizes)
    assert_close(y, reference(rows, weight, contracted, sizes), jnp.float32)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_non_finite_row_does_not_change_other_rows(value):
    rows, weight = random_rows(200, 512), weights("plain", jnp.float32, 1, 4)
    clean = np.asarray(run(rows, weight, 1, [70, 0, 57, 60]))
    y = np.asarray(run(rows.at[69].set(value), weight, 1, [70, 0, 57, 60]))
    assert not np.isfinite(y[69]).any()
    np.testing.assert_array_equal(np.delete(y, 69, axis=0), np.delete(clean, 69, axis=0))


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_gradient_matches_reference(sizes, dtype):
    """Rows past the last group do not contribute, whatever their values."""
    left, right = random_rows(256, 384, dtype), random_rows(256, 256, dtype, seed=2)
    want = [np.asarray(left, np.float32)[s].T @ np.asarray(right, np.float32)[s] for s in slices(sizes)]
    left = left.at[sum(sizes) :].set(np.nan)
    y = gradient(left, right, jnp.asarray(sizes), interpret=True)
    assert y.dtype == dtype
    assert_close(y, np.stack(want), dtype)


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize("fmt", ["plain", "int8", "int4-128"])
@pytest.mark.parametrize("sizes", [[300, 0, 57, 130], [0, 0, 0, 0], [0, 512, 0, 0], [3, 0, 0, 0]], ids=str)
def test_grouped_bytes_match_the_grid(sizes, fmt, contracted):
    rows, weight = random_rows(512, 512, jnp.bfloat16), weights(fmt, jnp.bfloat16, contracted, len(sizes))
    for tiles in (GroupedTiles(128, 128), GroupedTiles(256, 384)):
        operands = grouped_operands(rows, weight, contracted, tiles)
        steps = jax.jit(grouped_steps, static_argnums=(1, 2))(jnp.asarray(sizes), 512, tiles.rows)
        grid = grouped_grid(operands, contracted, steps, tiles, WeightFormat.of(weight))
        specs, arrays = [*grid.in_specs, grid.out_specs], [*operands, jnp.zeros((512, 384), jnp.bfloat16)]
        size = fetched_bytes(specs, arrays, tuple(map(int, grid.grid)), steps[:-1])
        assert grouped_bytes(rows, weight, contracted, sizes, tiles) == size


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize("fmt", FORMATS)
def test_published_sizes_have_tiles_within_vmem(fmt, contracted):
    for experts, width in ((16, 10752), (2, 10752), (1, 2688)):
        weight = shape_of((experts, width, 6144), fmt, contracted)
        rows = jax.ShapeDtypeStruct((2048, 6144 if contracted else width), jnp.bfloat16)
        assert supports(rows, weight, contracted)
        tiles = default_tiles(rows, weight, contracted)
        assert tiles in tile_candidates(rows, weight, contracted)
        assert vmem_bytes(rows, weight, contracted, tiles) <= 48 << 20


def test_supports_rejects_unsupported_operands():
    rows = random_rows(64, 512)
    for contracted in (0, 1):
        weight = weights("int4-128", jnp.float32, contracted, 2)
        assert supports(rows, weight, contracted)
        assert not supports(random_rows(64, 256), weight, contracted)
        assert not supports(rows.astype(jnp.float16), weight, contracted)
    unknown = dataclasses.replace(weights("int8", jnp.float32, 1, 2), kind="nvfp4")
    assert not supports(rows, unknown, 1)  # a format without a kernel
    square = weights("int8", jnp.float32, 1, 2, 512, 512)
    assert not supports(rows, square, 0)
    assert not supports(random_rows(64, 384), weights("int4", jnp.float32, 1, 2, 384), 1)
    assert not supports(random_rows(64, 100), weights("plain", jnp.float32, 1, 2, 100), 1)
