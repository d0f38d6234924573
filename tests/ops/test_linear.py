"""Tests of matmuls with plain and quantised weights against a matmul with the dequantised weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.ops import linear as module
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import MAX_ROWS_WEIGHT_LEFT, dequantized, gated, linear, matrix
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS, MAX_ROWS, small_batch_matmul
from dbrx_jax.quantization import Format, quantize

FORMATS = (None, "int8", "fp8", "int4", "int4-32")


def random_weight(fmt, shape, contracted, dtype=jnp.float32, seed=0):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if fmt is None:
        return jnp.asarray(values, dtype)
    return quantize(jnp.asarray(values), Format.parse(fmt), contracted, dtype)


@settings(max_examples=12)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([1, 2, 7, 40]),
    st.sampled_from([(72, 96), (100, 64)]),
    st.sampled_from([0, 1]),
    st.sampled_from(["cpu", "tpu"]),
    st.sampled_from([64, 1 << 20]),
)
def test_linear_matches_dequantised_matmul(fmt, rows, shape, contracted, platform, block):
    """Covers one and many blocks, and the CPU and TPU implementations."""
    w = random_weight(fmt, shape, (contracted - 2,))
    x = np.random.default_rng(1).normal(size=(rows, shape[contracted])).astype(np.float32)
    plain = np.asarray(dequantized(w), np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        y = jax.jit(lambda x, w: linear(x, w, contracted, platform))(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x @ (plain.T if contracted else plain), rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(
    st.sampled_from([None, "bfloat16", "int8"]),
    st.integers(MAX_ROWS + 1, MAX_ROWS_WEIGHT_LEFT + 1),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from(sorted(ACTIVATIONS)),
)
def test_mid_size_linear_and_gated_match_reference(fmt, rows, tiles, columns, activation):
    """Plain weights are the left operand on a CPU; covers linear and gated matmuls of any size."""
    dtype = jnp.bfloat16 if fmt == "bfloat16" else jnp.float32
    gate, up = (random_weight(fmt if fmt == "int8" else None, (16 * tiles, columns), (-1,), dtype, n) for n in (0, 1))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, columns)), dtype)
    run = jax.jit(lambda x, *w: (linear(x, w[0], 1, "cpu"), gated(x, *w, ACTIVATIONS[activation], "cpu")))
    a, b = (np.float32(x) @ np.float32(dequantized(w)).T for w in (gate, up))
    limit = 2e-2 if fmt == "bfloat16" else 1e-5
    for y, want in zip(run(x, gate, up), (a, np.asarray(ACTIVATIONS[activation](a)) * b), strict=True):
        assert y.dtype == dtype
        assert np.abs(np.float32(y) - want).max() <= limit * max(1, np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiled_matmul_keeps_the_weight_on_the_left(dtype):
    """XLA would swap the operands of a transposed matmul, and copy the weight to another layout."""
    x, w = jnp.ones((24, 96), dtype), jnp.ones((160, 96), dtype)
    for product in (
        lambda x, w: linear(x, w, 1, "cpu"),
        lambda x, w: gated(x, w, 2 * w, ACTIVATIONS["silu"], "cpu"),
        lambda x, w: linear(gated(x, w, 2 * w, ACTIVATIONS["silu"], "cpu"), w, 0, "cpu"),
    ):
        text = jax.jit(product, compiler_options=CPU_OPTIONS).lower(x, w).compile().as_text()
        assert re.search(r"f32\[160,24\]\S* dot\(", text)
        assert not re.search(r"f32\[24,160\]\S* dot\(", text)
        assert "lhs_contracting_dims={0}" not in text


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_in_bfloat16_matches_reference(fmt, contracted, rows):
    w = random_weight(fmt, (72, 96), (contracted - 2,), jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, w.shape[contracted])), jnp.bfloat16)
    plain = np.float32(dequantized(w))
    want = np.float32(x) @ (plain.T if contracted else plain)
    y = jax.jit(lambda x, w: linear(x, w, contracted, "cpu"))(x, w)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.float32(y) - want).max() < 1e-2 * np.abs(want).max()
    y_float32 = linear(x, w, contracted, "cpu", jnp.float32)
    assert y_float32.dtype == jnp.float32
    np.testing.assert_allclose(y_float32, want, rtol=0, atol=5e-3 * np.abs(want).max())


@pytest.mark.parametrize("fmt", FORMATS)
def test_matrix_reshapes_the_dequantised_weight(fmt):
    w = random_weight(fmt, (6, 4, 64), (-2, -1))
    flat = matrix(w, 1)
    assert flat.shape == (6, 256)
    np.testing.assert_array_equal(dequantized(flat), dequantized(w).reshape(6, 256))


def test_quantised_weight_is_dequantised_in_blocks():
    w = random_weight("int8", (1024, 2048), (-1,), jnp.bfloat16)
    program = jax.jit(lambda x, w: linear(x, w, 1, "cpu")).lower(jnp.ones((1, 2048), jnp.bfloat16), w).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * 2 * module.BLOCK
    assert "bf16[1024,2048]" not in program.as_text()
    assert "f32[1024,2048]" not in program.as_text()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_plain_weight_is_not_copied(rows):
    """XLA for CPUs would transpose and cast the weight of a plain dot product."""
    w = jnp.ones((512, 256), jnp.bfloat16)
    for contracted in (0, 1):
        x = jnp.ones((rows, w.shape[contracted]), jnp.bfloat16)
        product = jax.jit(lambda x, w, c=contracted: linear(x, w, c, "cpu"), compiler_options=CPU_OPTIONS)
        # A one-row matmul over the weight's rows keeps an eighth of its elements in float32.
        assert product.lower(x, w).compile().memory_analysis().temp_size_in_bytes < 0.3 * w.nbytes


@pytest.mark.parametrize("fmt", [None, "int8", "int4", "int4-32"])
@pytest.mark.parametrize(("rows", "contracted"), [(1, 0), (1, 1), (2, 1), (MAX_ROWS, 1)])
def test_small_batch_matmul_matches_reference_and_isolates_non_finite_rows(fmt, rows, contracted):
    """Compiled as for decoding on a CPU; values that are not finite stay in their row."""
    w = random_weight(fmt, (160, 96), (contracted - 2,))
    x = np.random.default_rng(1).normal(size=(rows, w.shape[contracted])).astype(np.float32)
    plain = np.asarray(dequantized(w), np.float64)
    plain = plain.T if contracted else plain
    product = jax.jit(lambda x, w: small_batch_matmul(x, w, contracted), compiler_options=CPU_OPTIONS)
    y = product(x, w)
    np.testing.assert_allclose(y, x @ plain, rtol=1e-5, atol=1e-5)
    for bad in (np.inf, np.nan):
        x[0, 5] = bad
        y_bad = np.asarray(product(x, w))
        with np.errstate(invalid="ignore"):
            want = x @ plain
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(y_bad), finite)
        np.testing.assert_array_equal(np.sign(y_bad[~finite]), np.sign(want[~finite]))
        np.testing.assert_array_equal(y_bad[1:], np.asarray(y)[1:])


def test_small_batch_matmul_returns_none_when_unsupported():
    x = jnp.ones((1, 96))
    assert small_batch_matmul(jnp.ones((MAX_ROWS + 1, 96)), random_weight(None, (64, 96), (-1,)), 1) is None
    assert MAX_ROWS < ROW_TILE  # row tiles give the same results in all programs
    assert small_batch_matmul(x, random_weight("fp8", (64, 96), (-1,)), 1) is None
    assert small_batch_matmul(x, random_weight(None, (63, 96), (-1,)), 1) is None
    assert small_batch_matmul(jnp.ones((1, 67)), random_weight(None, (67, 96), (-2,)), 0) is None
    assert small_batch_matmul(jnp.ones((2, 64)), random_weight(None, (64, 96), (-2,)), 0) is None


@pytest.mark.parametrize("fmt", [None, "int8"])
def test_weight_is_not_cast_outside_a_loop(fmt):
    """XLA would cast the weight to float32 before the loop and store the result."""
    w = random_weight(fmt, (512, 512), (-1,), jnp.bfloat16)

    def run(x, w, steps):
        return jax.lax.fori_loop(0, steps, lambda i, x: linear(x, w, 1, "cpu"), x)

    program = jax.jit(run, compiler_options=CPU_OPTIONS).lower(jnp.ones((1, 512), jnp.bfloat16), w, 3).compile()
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / 4
