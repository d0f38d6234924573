"""Products with plain and quantised weights against the plain product with what they stand for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.ops import linear as module
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import MAX_ROWS_BESIDE, dequantized, gated, linear, matrix
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS, MAX_ROWS, small_batch_matmul
from dbrx_jax.quantization import Format, quantize

FORMATS = (None, "int8", "fp8", "int4", "int4-32")


def weight(form, shape, contracted, dtype=jnp.float32, seed=0):
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if form is None:
        return jnp.asarray(drawn, dtype)
    return quantize(jnp.asarray(drawn), Format.parse(form), contracted, dtype)


@settings(max_examples=12)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([1, 2, 7, 40]),
    st.sampled_from([(72, 96), (100, 64)]),
    st.sampled_from([0, 1]),
    st.sampled_from(["cpu", "tpu"]),
    st.sampled_from([64, 1 << 20]),
)
def test_matches_the_plain_product(form, rows, shape, contracted, platform, block):
    """Also in many blocks, and as other platforms compute it."""
    w = weight(form, shape, (contracted - 2,))
    x = np.random.default_rng(1).normal(size=(rows, shape[contracted])).astype(np.float32)
    plain = np.asarray(dequantized(w), np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        y = jax.jit(lambda x, w: linear(x, w, contracted, platform))(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x @ (plain.T if contracted else plain), rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(
    st.sampled_from([None, "bfloat16", "int8"]),
    st.integers(MAX_ROWS + 1, MAX_ROWS_BESIDE + 1),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from(sorted(ACTIVATIONS)),
)
def test_products_of_some_rows(form, rows, strips, columns, activation):
    """Plain weights stand on the left of them on a CPU, alone and gated, and however small they are."""
    dtype = jnp.bfloat16 if form == "bfloat16" else jnp.float32
    gate, up = (weight(form if form == "int8" else None, (16 * strips, columns), (-1,), dtype, n) for n in (0, 1))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, columns)), dtype)
    run = jax.jit(lambda x, *w: (linear(x, w[0], 1, "cpu"), gated(x, *w, ACTIVATIONS[activation], "cpu")))
    a, b = (np.float32(x) @ np.float32(dequantized(w)).T for w in (gate, up))
    limit = 2e-2 if form == "bfloat16" else 1e-5
    for y, want in zip(run(x, gate, up), (a, np.asarray(ACTIVATIONS[activation](a)) * b), strict=True):
        assert y.dtype == dtype
        assert np.abs(np.float32(y) - want).max() <= limit * max(1, np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xla_leaves_a_weight_on_the_left(dtype):
    """It swaps the sides of a product whose result is transposed, and would lay the weight out anew."""
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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16(form, contracted, rows):
    w = weight(form, (72, 96), (contracted - 2,), jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, w.shape[contracted])), jnp.bfloat16)
    plain = np.float32(dequantized(w))
    want = np.float32(x) @ (plain.T if contracted else plain)
    y = jax.jit(lambda x, w: linear(x, w, contracted, "cpu"))(x, w)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.float32(y) - want).max() < 1e-2 * np.abs(want).max()
    wide = linear(x, w, contracted, "cpu", jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, want, rtol=0, atol=5e-3 * np.abs(want).max())


@pytest.mark.parametrize("form", FORMATS)
def test_matrix_keeps_what_the_weight_stands_for(form):
    w = weight(form, (6, 4, 64), (-2, -1))
    flat = matrix(w, 1)
    assert flat.shape == (6, 256)
    np.testing.assert_array_equal(dequantized(flat), dequantized(w).reshape(6, 256))


def test_a_quantised_weight_is_not_turned_into_floats_as_a_whole():
    w = weight("int8", (1024, 2048), (-1,), jnp.bfloat16)
    program = jax.jit(lambda x, w: linear(x, w, 1, "cpu")).lower(jnp.ones((1, 2048), jnp.bfloat16), w).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * 2 * module.BLOCK
    assert "bf16[1024,2048]" not in program.as_text()
    assert "f32[1024,2048]" not in program.as_text()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_plain_weight_is_not_copied(rows):
    """Neither transposed nor cast: XLA for CPUs does both to a product written in another way."""
    w = jnp.ones((512, 256), jnp.bfloat16)
    for contracted in (0, 1):
        x = jnp.ones((rows, w.shape[contracted]), jnp.bfloat16)
        product = jax.jit(lambda x, w, c=contracted: linear(x, w, c, "cpu"), compiler_options=CPU_OPTIONS)
        # Of one row over a weight's rows, an eighth of the elements in float32.
        assert product.lower(x, w).compile().memory_analysis().temp_size_in_bytes < 0.3 * w.nbytes


@pytest.mark.parametrize("form", [None, "int8", "int4", "int4-32"])
@pytest.mark.parametrize(("rows", "contracted"), [(1, 0), (1, 1), (2, 1), (MAX_ROWS, 1)])
def test_small_batches_in_programs_that_reorder_sums(form, rows, contracted):
    """As decoding on a CPU is compiled; what is not finite stays so, in its own row."""
    w = weight(form, (160, 96), (contracted - 2,))
    x = np.random.default_rng(1).normal(size=(rows, w.shape[contracted])).astype(np.float32)
    plain = np.asarray(dequantized(w), np.float64)
    plain = plain.T if contracted else plain
    product = jax.jit(lambda x, w: small_batch_matmul(x, w, contracted), compiler_options=CPU_OPTIONS)
    y = product(x, w)
    np.testing.assert_allclose(y, x @ plain, rtol=1e-5, atol=1e-5)
    for bad in (np.inf, np.nan):
        x[0, 5] = bad
        spoiled = np.asarray(product(x, w))
        with np.errstate(invalid="ignore"):
            want = x @ plain
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(spoiled), finite)
        np.testing.assert_array_equal(np.sign(spoiled[~finite]), np.sign(want[~finite]))
        np.testing.assert_array_equal(spoiled[1:], np.asarray(y)[1:])


def test_small_batch_matmul_refuses_what_it_does_not_support():
    x = jnp.ones((1, 96))
    assert small_batch_matmul(jnp.ones((MAX_ROWS + 1, 96)), weight(None, (64, 96), (-1,)), 1) is None
    assert MAX_ROWS < ROW_TILE  # whose products are the same in all programs
    assert small_batch_matmul(x, weight("fp8", (64, 96), (-1,)), 1) is None
    assert small_batch_matmul(x, weight(None, (63, 96), (-1,)), 1) is None
    assert small_batch_matmul(jnp.ones((1, 67)), weight(None, (67, 96), (-2,)), 0) is None
    assert small_batch_matmul(jnp.ones((2, 64)), weight(None, (64, 96), (-2,)), 0) is None


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_weight_stays_as_it_lies_in_a_loop_over_tokens(form):
    """XLA would turn it into floats ahead of the loop, and keep those."""
    w = weight(form, (512, 512), (-1,), jnp.bfloat16)

    def run(x, w, steps):
        return jax.lax.fori_loop(0, steps, lambda i, x: linear(x, w, 1, "cpu"), x)

    program = jax.jit(run, compiler_options=CPU_OPTIONS).lower(jnp.ones((1, 512), jnp.bfloat16), w, 3).compile()
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / 4
