"""Grouped matrix products for Hopper GPUs, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.gpu import grouped_gradient as gradient
from dbrx_jax.kernels.gpu import grouped_matmul as grouped
from tests.kernels.gpu import INTERPRET, copied, error, fresh_interpreter  # noqa: F401
from tests.kernels.weights import floats, weight_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


def matrices(form, contracted, dtype=jnp.bfloat16, E=3):
    C, M = (128, 192) if contracted == 1 else (192, 128)
    if form == "int4-64" and contracted == 1:
        C = 256
    shape = (E, M, C) if contracted == 1 else (E, C, M)
    return weight_of(shape, form, contracted, dtype), C, M


def run(rows, w, contracted, sizes, tiles=None):
    assert grouped.supports(rows, w, contracted, interpret=True)
    function = jax.jit(lambda *a: grouped.grouped_matmul(a[0], a[1], contracted, a[2], tiles, INTERPRET))
    return function(rows, w, jnp.array(sizes, jnp.int32))


def reference(rows, w, contracted, sizes):
    w, rows = floats(w), floats(rows)
    y, start = np.zeros((rows.shape[0], w.shape[2 - contracted]), np.float32), 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own] = rows[own] @ (w[e].T if contracted == 1 else w[e])
        start += size
    return y


def normal(P, C, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(2), (P, C)).astype(dtype)


@pytest.mark.parametrize("contracted", [1, 0])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("plain", jnp.bfloat16), ("plain", jnp.float32), *((f, jnp.bfloat16) for f in ("int8", "fp8", "int4", "int4-64"))],
)
def test_each_row_times_its_own_matrix(form, dtype, contracted):
    w, C, M = matrices(form, contracted, dtype)
    sizes = [70, 0, 33]
    rows = normal(150, C, dtype)
    y = run(rows, w, contracted, sizes)
    assert y.dtype == dtype
    assert y.shape == (150, M)
    assert error(y, reference(rows, w, contracted, sizes)) < (1e-5 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_array_equal(floats(y)[103:], 0)


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
def test_ragged_and_empty_groups_with_rows_past_the_end(form, contracted, sizes, past):
    w, C, _ = matrices(form, contracted)
    rows = normal(max(sum(sizes) + past, 1), C)
    y = run(rows, w, contracted, sizes)
    assert error(y, reference(rows, w, contracted, sizes)) < 1e-2


@pytest.mark.slow
@settings(max_examples=6)
@given(st.lists(st.integers(0, 70), min_size=3, max_size=3), st.integers(0, 30))
def test_the_gradient_of_any_groups(sizes, past):
    count = max(sum(sizes) + past, 1)
    out, rows = normal(count, 128), normal(count, 256)[::-1]
    found = jax.jit(lambda *a: gradient.grouped_gradient(*a, interpret=INTERPRET))(out, rows, jnp.array(sizes))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    assert error(found, np.stack([floats(out)[p].T @ floats(rows)[p] for p in parts])) < 1e-2


@pytest.mark.parametrize("form", ["plain", "int8"])
def test_a_row_that_is_not_finite_spoils_no_other(form):
    w, C, _ = matrices(form, 0)
    sizes, rows = [40, 20, 0], normal(70, C)
    y = floats(run(rows.at[10].set(np.inf).at[65].set(np.nan), w, 0, sizes))
    assert error(np.delete(y, 10, 0), np.delete(reference(rows, w, 0, sizes), 10, 0)) < 1e-2


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(jnp.bfloat16, [70, 0, 33]), (jnp.bfloat16, [0, 0, 0]), (jnp.float32, [64, 0, 86]), (jnp.bfloat16, [150, 0, 0])],
)
def test_the_gradient_of_the_weights(dtype, sizes):
    out, rows = normal(150, 128, dtype), normal(150, 256, dtype)[::-1]
    if sum(sizes) < 150:  # what belongs to nobody
        out, rows = out.at[140].set(np.inf), rows.at[141].set(np.nan)
    assert gradient.gradient_supports(out, rows, interpret=True)
    function = jax.jit(lambda *a: gradient.grouped_gradient(*a, interpret=INTERPRET))
    found = function(out, rows, jnp.array(sizes, jnp.int32))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    expected = np.stack([floats(out)[p].T @ floats(rows)[p] for p in parts])
    assert found.shape == (3, 128, 256)
    assert error(found, expected) < (1e-5 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_array_equal(floats(found)[np.array(sizes) == 0], 0)


@pytest.mark.parametrize("form", ["plain", "int8", "int4-64"])
def test_bytes_are_those_of_the_copies(form, copied):  # noqa: F811
    w, C, _ = matrices(form, 1)
    sizes, rows = [40, 0, 33], normal(80, C)
    run(rows, w, 1, sizes)
    read, written = grouped.grouped_bytes(rows, w, 1, sizes)
    assert copied["in"] == read
    assert copied["out"] == written


def test_what_it_does_not_take_is_said():
    w, C, _ = matrices("int8", 1)
    rows = normal(8, C)
    assert grouped.supports(rows, w, 1)
    assert not grouped.supports(rows.astype(jnp.float32), w, 1)
    assert not grouped.supports(rows, weight_of((2, 100, 128), "int8", 1), 1)
    assert not grouped.supports(rows, weight_of((2, 100, 128), "plain", 1), 1)
    assert not gradient.gradient_supports(normal(8, 100), rows)
