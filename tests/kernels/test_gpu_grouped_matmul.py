"""Tests of the grouped matmul for Hopper GPUs, interpreted on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu import grouped_gradient as gradient
from dbrx_jax.kernels.gpu import grouped_matmul as grouped
from dbrx_jax.kernels.gpu.grouped_quantized import GroupedTiles, row_tiles
from tests.kernels.gpu import INTERPRET, copied_bytes, fresh_interpreter, max_error  # noqa: F401
from tests.kernels.weights import to_float32, weight_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


def random_weights(fmt, contracted, dtype=jnp.bfloat16, E=3):
    C, M = (128, 192) if contracted == 1 else (192, 128)
    if fmt == "int4-64" and contracted == 1:
        C = 256
    shape = (E, M, C) if contracted == 1 else (E, C, M)
    return weight_of(shape, fmt, contracted, dtype), C, M


def run(rows, w, contracted, sizes, tiles=None, interpret=INTERPRET):
    assert grouped.supports(rows, w, contracted, interpret=True)
    function = jax.jit(lambda *a: grouped.grouped_matmul(a[0], a[1], contracted, a[2], tiles, interpret))
    return function(rows, w, jnp.array(sizes, jnp.int32))


def reference(rows, w, contracted, sizes):
    w, rows = to_float32(w), to_float32(rows)
    y, start = np.zeros((rows.shape[0], w.shape[2 - contracted]), np.float32), 0
    for e, size in enumerate(sizes):
        group = slice(start, start + size)
        y[group] = rows[group] @ (w[e].T if contracted == 1 else w[e])
        start += size
    return y


def random_rows(P, C, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(2), (P, C)).astype(dtype)


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [("plain", jnp.bfloat16), ("plain", jnp.float32), *((f, jnp.bfloat16) for f in ("int8", "fp8", "int4", "int4-64"))],
)
def test_grouped_matmul_matches_reference(fmt, dtype, contracted):
    w, C, M = random_weights(fmt, contracted, dtype)
    sizes = [70, 0, 33]
    rows = random_rows(150, C, dtype)
    y = run(rows, w, contracted, sizes)
    assert y.dtype == dtype
    assert y.shape == (150, M)
    assert max_error(y, reference(rows, w, contracted, sizes)) < (1e-5 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_array_equal(to_float32(y)[103:], 0)


@pytest.mark.parametrize(
    ("fmt", "contracted", "tiles"),
    [
        ("int8", 1, (128, 256, 64, 3, 6)),
        ("int8", 0, (128, 128, 64, 5, 5)),
        ("int4-128", 1, (128, 256, 64, 2, 8)),
        pytest.param(*("int4-64", 1, (256, 128, 64, 2, 4)), marks=pytest.mark.slow),
        ("int4-32", 0, (128, 128, 64, 3, 7)),
        pytest.param(*("fp8", 1, (192, 128, 64, 3, 5)), marks=pytest.mark.slow),
        ("plain", 1, (128, 256, 64, 4, 4)),
        pytest.param(*("plain", 0, (256, 128, 64, 3, 3)), marks=pytest.mark.slow),
    ],
)
def test_two_warpgroups_match_reference_without_races(fmt, contracted, tiles):
    """Blocks have several output tiles, whole and half ones, and more steps than slots."""
    C, M = (640, 256) if contracted == 1 else (768, 512)
    if fmt.startswith("int4") and contracted == 1:
        C = 1024
    w = weight_of((3, M, C) if contracted == 1 else (3, C, M), fmt, contracted)
    sizes, rows = [203, 0, 62], random_rows(270, C)
    y = run(rows, w, contracted, sizes, GroupedTiles(*tiles), plgpu.InterpretGPUParams(detect_races=True))
    assert max_error(y, reference(rows, w, contracted, sizes)) < 1e-2
    assert not callbacks.get_races().races_found


@given(st.lists(st.integers(0, 300), min_size=5, max_size=5), st.sampled_from([64, 128, 256]))
@example([7, 1, 0, 128, 129], 128)
@example([300, 300, 300, 300, 300], 256)
def test_row_tiles_have_each_row_once(sizes, tile_rows):
    num_rows = 1504
    listed = row_tiles(np.array(sizes), num_rows, tile_rows)
    count, groups = int(listed.number[0]), np.full(num_rows, -1)
    assert count <= len(listed.group)
    for group, first, start, end in zip(*(np.asarray(a)[:count] for a in listed[:4]), strict=True):
        assert 0 <= start < end <= tile_rows
        assert 0 <= first * 8 <= num_rows - tile_rows
        assert (groups[first * 8 + start : first * 8 + end] == -1).all()
        groups[first * 8 + start : first * 8 + end] = group
    np.testing.assert_array_equal(groups[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
    assert (groups[sum(sizes) :] == -1).all()


@pytest.mark.slow  # a run of the interpreter takes seconds
@settings(max_examples=12)
@given(
    st.sampled_from(["plain", "int8", "fp8", "int4", "int4-64"]),
    st.sampled_from([0, 1]),
    st.lists(st.integers(0, 60), min_size=3, max_size=3),
    st.integers(0, 40),
)
@example("int8", 1, [0, 0, 0], 5)
@example("int8", 1, [0, 130, 0], 0)
@example("plain", 1, [1, 0, 63], 1)
@example("int4-64", 0, [64, 0, 1], 0)
def test_random_groups_with_trailing_rows_match_reference(fmt, contracted, sizes, trailing):
    w, C, _ = random_weights(fmt, contracted)
    rows = random_rows(max(sum(sizes) + trailing, 1), C)
    y = run(rows, w, contracted, sizes)
    assert max_error(y, reference(rows, w, contracted, sizes)) < 1e-2


@pytest.mark.slow
@settings(max_examples=6)
@given(st.lists(st.integers(0, 70), min_size=3, max_size=3), st.integers(0, 30))
def test_gradient_of_random_groups_matches_reference(sizes, trailing):
    count = max(sum(sizes) + trailing, 1)
    out, rows = random_rows(count, 128), random_rows(count, 256)[::-1]
    actual = jax.jit(lambda *a: gradient.grouped_gradient(*a, interpret=INTERPRET))(out, rows, jnp.array(sizes))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    assert max_error(actual, np.stack([to_float32(out)[p].T @ to_float32(rows)[p] for p in parts])) < 1e-2


@pytest.mark.parametrize("fmt", ["plain", "int8"])
def test_non_finite_row_does_not_change_other_rows(fmt):
    w, C, _ = random_weights(fmt, 0)
    sizes, rows = [40, 20, 0], random_rows(70, C)
    y = to_float32(run(rows.at[10].set(np.inf).at[65].set(np.nan), w, 0, sizes))
    assert max_error(np.delete(y, 10, 0), np.delete(reference(rows, w, 0, sizes), 10, 0)) < 1e-2


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(jnp.bfloat16, [70, 0, 33]), (jnp.bfloat16, [0, 0, 0]), (jnp.float32, [64, 0, 86]), (jnp.bfloat16, [150, 0, 0])],
)
def test_grouped_gradient_matches_reference(dtype, sizes):
    out, rows = random_rows(150, 128, dtype), random_rows(150, 256, dtype)[::-1]
    if sum(sizes) < 150:  # rows past the last group
        out, rows = out.at[140].set(np.inf), rows.at[141].set(np.nan)
    assert gradient.gradient_supports(out, rows, interpret=True)
    function = jax.jit(lambda *a: gradient.grouped_gradient(*a, interpret=INTERPRET))
    actual = function(out, rows, jnp.array(sizes, jnp.int32))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    expected = np.stack([to_float32(out)[p].T @ to_float32(rows)[p] for p in parts])
    assert actual.shape == (3, 128, 256)
    assert max_error(actual, expected) < (1e-5 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_array_equal(to_float32(actual)[np.array(sizes) == 0], 0)


@pytest.mark.parametrize("fmt", ["plain", "int8", "int4-64"])
def test_grouped_bytes_match_the_copies(fmt, copied_bytes):  # noqa: F811
    w, C, _ = random_weights(fmt, 1)
    sizes, rows = [40, 0, 33], random_rows(80, C)
    run(rows, w, 1, sizes)
    read, written = grouped.grouped_bytes(rows, w, 1, sizes)
    assert copied_bytes["in"] == read
    assert copied_bytes["out"] == written


def test_supports_rejects_unsupported_operands():
    w, C, _ = random_weights("int8", 1)
    rows = random_rows(8, C)
    assert grouped.supports(rows, w, 1)
    assert not grouped.supports(rows.astype(jnp.float32), w, 1)
    assert not grouped.supports(rows, dataclasses.replace(w, kind="nvfp4"), 1)  # a format without a kernel
    assert not grouped.supports(rows, weight_of((2, 100, 128), "int8", 1), 1)
    assert not grouped.supports(rows, weight_of((2, 100, 128), "plain", 1), 1)
    assert not gradient.gradient_supports(random_rows(8, 100), rows)
