"""The TPU's grouped products, interpreted on the CPU, against a product for each group in float32."""

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
from tests.kernels.test_tpu_decode_experts import BOUNDS, FORMS, assert_close, moved, rows_of
from tests.kernels.weights import QUICKLY, floats, shape_of, weight_of

pytestmark = pytest.mark.slow  # the lane of the newest JAX runs it too

SIZES = ([70, 0, 57, 100], [0, 0, 0, 0], [0, 250, 0, 0], [128, 0, 128, 0], [1, 2, 0, 3], [250])


product = jax.jit(grouped_matmul, static_argnames=("contracted", "tiles", "interpret"), compiler_options=QUICKLY)
gradient = jax.jit(grouped_gradient, static_argnames="interpret", compiler_options=QUICKLY)


def weights(form, dtype, contracted, experts, c=512, m=384):
    return weight_of((experts, m, c) if contracted else (experts, c, m), form, contracted, dtype)


def groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def reference(rows, weight, contracted, sizes):
    rows, weight = np.asarray(rows.astype(jnp.float32)), floats(weight)
    y = np.zeros((len(rows), weight.shape[1 if contracted else 2]), np.float32)
    for own, w in zip(groups(sizes), weight, strict=True):
        y[own] = rows[own] @ (w.T if contracted else w)
    return y


def run(rows, weight, contracted, sizes, tiles=None):
    assert supports(rows, weight, contracted)
    y = product(rows, weight, contracted=contracted, sizes=jnp.asarray(sizes), tiles=tiles, interpret=True)
    assert y.dtype == rows.dtype
    return y


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((f, jnp.float32) for f in FORMS if f != "int4-32"),
        pytest.param("int4-32", jnp.float32, marks=pytest.mark.slow),
        ("plain", jnp.bfloat16),
        ("int4-128", jnp.bfloat16),
    ],
)
def test_products_by_group(form, contracted, dtype):
    rows, weight = rows_of(260, 512, dtype), weights(form, dtype, contracted, 4)
    y = run(rows, weight, contracted, SIZES[0], GroupedTiles(128, 128))
    assert_close(y, reference(rows, weight, contracted, SIZES[0]), dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_of_any_size(sizes):
    """Also with rows past all of them, which are nobody's."""
    rows, weight = rows_of(256, 256), weights("int8", jnp.float32, 1, len(sizes), 256)
    y = run(rows.at[sum(sizes) :].set(np.nan), weight, 1, sizes)
    assert_close(y, reference(rows, weight, 1, sizes), jnp.float32)
    assert not np.asarray(y)[sum(sizes) :].any()


@given(st.data())
@settings(max_examples=3)
def test_any_groups(data):
    sizes = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=6))
    rows = rows_of(sum(sizes) + data.draw(st.integers(1, 200)), 256)
    contracted, m = data.draw(st.integers(0, 1)), data.draw(st.sampled_from((128, 320, 640)))
    weight = weights(data.draw(st.sampled_from(("plain", "int8"))), jnp.float32, contracted, len(sizes), 256, m)
    y = run(rows, weight, contracted, sizes)
    assert_close(y, reference(rows, weight, contracted, sizes), jnp.float32)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_row_that_is_no_number_stays_alone(value):
    rows, weight = rows_of(200, 512), weights("plain", jnp.float32, 1, 4)
    clean = np.asarray(run(rows, weight, 1, [70, 0, 57, 60]))
    y = np.asarray(run(rows.at[69].set(value), weight, 1, [70, 0, 57, 60]))
    assert not np.isfinite(y[69]).any()
    np.testing.assert_array_equal(np.delete(y, 69, axis=0), np.delete(clean, 69, axis=0))


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_weights_gradient(sizes, dtype):
    """Rows past all groups are in none of them, whatever they are."""
    left, right = rows_of(256, 384, dtype), rows_of(256, 256, dtype, seed=2)
    want = [np.asarray(left, np.float32)[own].T @ np.asarray(right, np.float32)[own] for own in groups(sizes)]
    left = left.at[sum(sizes) :].set(np.nan)
    y = gradient(left, right, jnp.asarray(sizes), interpret=True)
    assert y.dtype == dtype
    assert_close(y, np.stack(want), dtype)


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize("form", ["plain", "int8", "int4-128"])
@pytest.mark.parametrize("sizes", [[300, 0, 57, 130], [0, 0, 0, 0], [0, 512, 0, 0], [3, 0, 0, 0]], ids=str)
def test_bytes_are_those_of_the_grid(sizes, form, contracted):
    rows, weight = rows_of(512, 512, jnp.bfloat16), weights(form, jnp.bfloat16, contracted, len(sizes))
    for tiles in (GroupedTiles(128, 128), GroupedTiles(256, 384)):
        operands = grouped_operands(rows, weight, contracted, tiles)
        steps = jax.jit(grouped_steps, static_argnums=(1, 2))(jnp.asarray(sizes), 512, tiles.rows)
        grid = grouped_grid(operands, contracted, steps, tiles, WeightFormat.of(weight))
        specs, arrays = [*grid.in_specs, grid.out_specs], [*operands, jnp.zeros((512, 384), jnp.bfloat16)]
        size = moved(specs, arrays, tuple(map(int, grid.grid)), steps[:-1])
        assert grouped_bytes(rows, weight, contracted, sizes, tiles) == size


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize("form", FORMS)
def test_published_sizes_have_tiles(form, contracted):
    for experts, width in ((16, 10752), (2, 10752), (1, 2688)):
        weight = shape_of((experts, width, 6144), form, contracted)
        rows = jax.ShapeDtypeStruct((2048, 6144 if contracted else width), jnp.bfloat16)
        assert supports(rows, weight, contracted)
        tiles = default_tiles(rows, weight, contracted)
        assert tiles in tile_candidates(rows, weight, contracted)
        assert vmem_bytes(rows, weight, contracted, tiles) <= 48 << 20


def test_what_is_not_taken():
    rows = rows_of(64, 512)
    for contracted in (0, 1):
        weight = weights("int4-128", jnp.float32, contracted, 2)
        assert supports(rows, weight, contracted)
        assert not supports(rows_of(64, 256), weight, contracted)
        assert not supports(rows.astype(jnp.float16), weight, contracted)
    square = weights("int8", jnp.float32, 1, 2, 512, 512)
    assert not supports(rows, square, 0)
    assert not supports(rows_of(64, 384), weights("int4", jnp.float32, 1, 2, 384), 1)
    assert not supports(rows_of(64, 100), weights("plain", jnp.float32, 1, 2, 100), 1)
