"""Tests of fixed-point activations and of matmuls of few rows with integer weights on Hopper GPUs, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.backend import KERNEL_BACKENDS
from dbrx_jax.kernels.gpu.fixed_point import DIGIT_BASE, LARGEST, to_fixed_point
from dbrx_jax.kernels.gpu.fixed_point_rows import fixed_point_rows
from dbrx_jax.kernels.gpu.integer_experts import group_rows
from dbrx_jax.kernels.gpu.integer_linear import integer_linear, supports
from dbrx_jax.kernels.gpu.integer_weights import pack, split_activations, transposed_order
from dbrx_jax.kernels.linear import linear
from dbrx_jax.quantization import Format, quantize
from tests.kernels.gpu import INTERPRET, fresh_interpreter, max_error  # noqa: F401
from tests.kernels.weights import to_float32, weight_of


def from_fixed_point(digits, largest):
    digits = np.asarray(digits, np.float32).reshape(*largest.shape, 2, -1)
    return (DIGIT_BASE * digits[..., 0, :] + digits[..., 1, :]) * np.asarray(largest)[..., None] / LARGEST


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_fixed_point_rounds_to_2_to_the_minus_15_of_the_largest_value(seed, exponent):
    rows = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32) * np.float32(2.0**exponent)
    rows[1, 7] *= 1000  # an outlier
    rows[2] = 0
    x = to_fixed_point(jnp.asarray(rows))
    error = np.abs(from_fixed_point(*x) - rows)
    assert np.all(error <= np.abs(rows).max(axis=1, keepdims=True) * 2.0**-15 * 1.01)
    assert np.abs(np.asarray(x.digits, np.int32)).max() <= 127


@pytest.mark.filterwarnings("ignore:invalid value")
def test_fixed_point_of_a_row_that_is_not_finite_is_not_finite():
    rows = jnp.ones((3, 8)).at[0, 1].set(jnp.inf).at[1, 2].set(jnp.nan)
    values = from_fixed_point(*to_fixed_point(rows))
    assert not np.isfinite(values[:2]).any()
    np.testing.assert_allclose(values[2], 1, rtol=2e-5)


@pytest.mark.parametrize(("fmt", "contracted"), [("int8", 1), ("int8", 0), ("int4-64", 1), ("int4-32", 0)])
def test_rows_are_computed_and_rounded_as_by_xla(fmt, contracted):
    """Two of three entries, of five rows in entries of eight, summed over two splits."""
    weight = pack(weight_of((1, 128, 512) if contracted else (1, 512, 128), fmt, contracted), contracted)
    a, b = (jax.random.normal(jax.random.key(i), (3, 2, 5, 512)) for i in range(2))
    compute = jax.jit(lambda a, b: fixed_point_rows(lambda x, y: x * y, [a, b], 8, jnp.int32(2), weight, INTERPRET))
    digits, largest = compute(a, b)
    expected = to_fixed_point(a.sum(axis=1) * b.sum(axis=1))
    np.testing.assert_allclose(largest[:2, :5], expected.largest[:2, :5], rtol=1e-6)
    expected_digits = np.asarray(split_activations(expected.digits, weight), np.int32)
    # The same but for the order of rounding: a last digit differs by 1, or wraps by DIGIT_BASE with the first.
    assert np.mean(np.asarray(digits)[:2, :, :10] != expected_digits[:2, :, :10]) < 1e-3


def test_transposed_order_interleaves_the_halves_of_each_16():
    order = np.asarray(transposed_order(jnp.arange(32)))
    np.testing.assert_array_equal(order[:16], [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    np.testing.assert_array_equal(order[16:], order[:16] + 16)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_entries_have_each_row_of_each_expert_once(C, N, size, seed):
    random = np.random.default_rng(seed)
    is_used = random.uniform(size=(C, N)) < random.uniform()
    items = jax.tree.map(np.asarray, group_rows(jnp.asarray(is_used), size))
    assert items.number == sum(-(-int(n) // size) for n in is_used.sum(axis=1))
    assert np.all(items.rows[items.number :] == N)
    for c, n in zip(*np.nonzero(is_used), strict=True):
        assert items.expert[items.entry[c, n]] == c
        assert items.rows[items.entry[c, n], items.slot[c, n]] == n
    assert np.sum(items.rows < N) == is_used.sum()


def weights_of(fmt, *shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    floats = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return [quantize(w, Format.parse(fmt), (-1,), jnp.bfloat16) for w in floats]


@pytest.mark.parametrize(("fmt", "rows"), [("int8", 1), ("int8", 13), ("int4-128", 3)])
def test_products_with_several_weights_match_reference(fmt, rows):
    weights = weights_of(fmt, (192, 1024), (64, 1024))
    x = jax.random.normal(jax.random.key(1), (rows, 1024)).astype(jnp.bfloat16)
    assert supports(x, *weights)
    for y, w in zip(jax.jit(lambda *a: integer_linear(*a, interpret=INTERPRET))(x, *weights), weights, strict=True):
        assert y.dtype == jnp.float32
        assert max_error(y, to_float32(x) @ to_float32(w).T) < 3e-4


def test_linear_supports_few_bfloat16_rows_and_weights_of_one_kind():
    x = jnp.ones((64, 1024), jnp.bfloat16)
    (int8,), (int4,) = weights_of("int8", (64, 1024)), weights_of("int4-128", (64, 1024))
    assert supports(x, int8)
    assert supports(x, int4)
    assert not supports(x, int8, int4)
    assert not supports(jnp.ones((65, 1024), jnp.bfloat16), int8)
    assert not supports(x.astype(jnp.float32), int8)
    assert not supports(x, weights_of("int8", (72, 1024))[0])
    assert not supports(x, jnp.ones((64, 1024), jnp.bfloat16))


def test_dispatched_linear_has_the_result_and_gradient_of_plain_xla(monkeypatch):
    monkeypatch.setitem(KERNEL_BACKENDS, "cpu", "gpu")
    (weight,) = weights_of("int8", (64, 256))
    x = jax.random.normal(jax.random.key(1), (3, 256)).astype(jnp.bfloat16)

    def loss(x, platform):
        return jnp.sum(jnp.sin(linear(x, weight, 1, platform).astype(jnp.float32)))

    y, dx = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x, "cpu")
    expected, expected_dx = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x, "tpu")  # XLA's dot
    assert abs(float(y) - float(expected)) < 0.1
    assert max_error(dx, to_float32(expected_dx)) < 2e-2
