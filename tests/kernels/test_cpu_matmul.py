"""Tests of the native matmul for CPUs against a float64 matmul with the dequantised weight, by instruction set."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.kernels import linear as module
from dbrx_jax.kernels.cpu.library import instruction_sets
from dbrx_jax.kernels.cpu.matmul import matmul, supports
from dbrx_jax.kernels.dispatch import native_kernels
from dbrx_jax.ops.linear import dequantized
from dbrx_jax.ops.linear import linear as xla_linear
from dbrx_jax.quantization import Format, QuantizedArray, quantize

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native kernels were not built")
FORMATS = ("float32", "bfloat16", "int8", "int4", "int4-32", "int4-64", "int4-128", "fp8")
SETS = instruction_sets()


def random_weight(fmt, shape, contracted, dtype=jnp.float32, seed=0):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if fmt in ("float32", "bfloat16"):
        return jnp.asarray(values, fmt)
    return jax.tree.map(jnp.asarray, quantize(values, Format.parse(fmt), (contracted - 2,), dtype))


def exact(weight):
    """Returns the weight in float64, dequantised without rounding to its dtype."""
    if isinstance(weight, QuantizedArray):
        return np.asarray(weight.dequantize(jnp.float32), np.float64)
    return np.asarray(weight, np.float64)


def random_rows(rows, columns, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, columns)), dtype)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("contracted", [0, 1])
def test_matmul_matches_float64(instruction_set, fmt, dtype, contracted):
    """Sizes are odd, below and above a vector, and cut groups short; rows fill no, one and several blocks."""
    for inputs, outputs in ((72, 101), (14, 5), (270, 300)) if "int4" in fmt else ((101, 72), (5, 14), (270, 301)):
        shape = (outputs, inputs) if contracted else (inputs, outputs)
        w = random_weight(fmt, shape, contracted, dtype)
        plain = exact(w).T if contracted else exact(w)
        for rows in (3, 40):
            x = random_rows(rows, shape[contracted], dtype)
            (y,) = matmul(x, [w], contracted, jnp.float32, instruction_set)
            want = np.asarray(x, np.float64) @ plain
            assert np.abs(np.asarray(y) - want).max() <= 3e-6 * np.abs(want).max(), (shape, rows)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("contracted", [0, 1])
def test_rows_are_independent_and_keep_what_is_not_finite(instruction_set, fmt, contracted):
    for dtype in (jnp.float32, jnp.bfloat16):
        w = random_weight(fmt, (160, 330), contracted, dtype)
        x = random_rows(45, w.shape[contracted], dtype)
        (y,) = matmul(x, [w], contracted, jnp.float32, instruction_set)
        for rows in (slice(0, 1), slice(3, 5), slice(7, 16), slice(20, 45)):
            np.testing.assert_array_equal(matmul(x[rows], [w], contracted, jnp.float32, instruction_set)[0], y[rows])
        bad = x.at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf).at[44, -1].set(-jnp.inf)
        (y_bad,) = matmul(bad, [w], contracted, jnp.float32, instruction_set)
        assert not np.isfinite(np.asarray(y_bad)[[1, 2, 44]]).any(axis=None) or fmt.startswith("int4")
        others = np.delete(np.arange(45), [1, 2, 44])
        np.testing.assert_array_equal(np.asarray(y_bad)[others], np.asarray(y)[others])


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_float8_is_exact(instruction_set):
    """Covers subnormal numbers, NaN and both signs, in both kernels."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = jnp.asarray(codes.view(jnp.float8_e4m3fn.dtype))
    for contracted, scale in ((1, (16, 1)), (0, (1, 16))):
        w = QuantizedArray(values, jnp.ones(scale, jnp.bfloat16), "fp8", (contracted - 2,))
        for column in range(16):  # one at a time: 0 times NaN would be NaN
            only = QuantizedArray(
                jnp.zeros_like(values).at[:, column].set(values[:, column]), w.scale, "fp8", w.contracted
            )
            x = jnp.ones((1, 16), jnp.bfloat16) if contracted else jnp.eye(16, dtype=jnp.bfloat16)
            (y,) = matmul(x, [only], contracted, jnp.float32, instruction_set)
            got = np.asarray(y)[0] if contracted else np.asarray(y)[:, column]
            want = np.asarray(values.astype(jnp.float32))[:, column]
            if contracted or np.isfinite(want).all():
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("instruction_set", SETS)
def test_extreme_values(instruction_set):
    """Denormal float32 are kept on every thread, and large numbers do not overflow before their sum does."""
    w = jnp.full((600, 64), 1e-20, jnp.float32)
    (y,) = matmul(jnp.full((3, 64), 1e-20, jnp.float32), [w], 1, jnp.float32, instruction_set)
    np.testing.assert_allclose(y, np.full((3, 600), 64e-40, np.float32), rtol=1e-4)
    (y,) = matmul(jnp.full((2, 64), 3e18, jnp.float32), [w * 1e38], 1, jnp.float32, instruction_set)
    np.testing.assert_allclose(y, np.full((2, 600), 64 * 3e36, np.float32), rtol=1e-5)


def test_several_weights_of_different_formats_in_one_call():
    x = random_rows(5, 96, jnp.bfloat16)
    weights = [random_weight(fmt, (n, 96), 1, jnp.bfloat16) for fmt, n in (("bfloat16", 40), ("int8", 7), ("fp8", 300))]
    for y, w in zip(matmul(x, weights, 1, jnp.bfloat16), weights, strict=True):
        assert y.dtype == jnp.bfloat16
        want = np.float32(x) @ np.float32(exact(w)).T
        assert np.abs(np.float32(y) - want).max() <= 1e-2 * np.abs(want).max()


def test_linear_is_differentiable():
    """Gradients are those of XLA's matmul."""
    x, w = random_rows(3, 96), random_weight("float32", (70, 96), 1)
    assert native_kernels("cpu") is not None

    def loss(linear, x, w):
        return jnp.sum(jnp.sin(linear(x, w, 1, "cpu")))

    for argument in (0, 1):
        got = jax.jit(jax.grad(lambda x, w: loss(module.linear, x, w), argument))(x, w)
        want = jax.grad(lambda x, w: loss(xla_linear, x, w), argument)(x, w)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_weights_are_not_copied_in_a_loop():
    w = random_weight("bfloat16", (512, 512), 1)

    def run(x, w, steps):
        return jax.lax.fori_loop(0, steps, lambda i, x: module.linear(x, w, 1, "cpu"), x)

    program = jax.jit(run).lower(jnp.ones((1, 512), jnp.bfloat16), w, 3).compile()
    assert 'custom_call_target="dbrx_matmul"' in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / 4


def test_supports_by_dtype():
    x = jnp.ones((1, 8))
    assert supports(x, random_weight("float32", (4, 8), 1), random_weight("int8", (4, 8), 1))
    assert not supports(x.astype(jnp.float16), random_weight("float32", (4, 8), 1))
    assert not supports(x, jnp.ones((4, 8), jnp.float16))
    assert not supports(x[:0], jnp.ones((4, 8)))


def test_without_kernels_xla_computes_the_same(monkeypatch):
    """As where they were not built, and with DBRX_KERNELS=0."""
    x, w = random_rows(3, 96), random_weight("int4-32", (70, 96), 1)
    with_kernels = module.linear(x, w, 1, "cpu")
    monkeypatch.setattr("dbrx_jax.kernels.cpu.library.instruction_sets", lambda: ())
    assert native_kernels("cpu") is None
    np.testing.assert_allclose(module.linear(x, w, 1, "cpu"), with_kernels, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setenv("DBRX_KERNELS", "0")
    assert native_kernels("cpu") is None
    assert native_kernels("tpu") is None


ONE_THREAD = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax.numpy as jnp, numpy as np
from tests.kernels.test_cpu_matmul import matmul, random_rows, random_weight
for fmt in ("float32", "int4-32"):
    for contracted in (0, 1):
        w = random_weight(fmt, (1100, 520), contracted, "bfloat16")
        (y,) = matmul(random_rows(3, w.shape[contracted], "bfloat16"), [w], contracted, jnp.float32)
        print(np.asarray(y).tobytes().hex())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_results_do_not_depend_on_the_number_of_threads():
    run = [[sys.executable, "-c", ONE_THREAD, n] for n in ("1", "2")]
    one, two = (subprocess.run(r, capture_output=True, text=True, check=True).stdout for r in run)
    assert len(one) > 1000
    assert one == two


def test_dequantised_reference_agrees():
    """The reference of this file is the library's own dequantisation."""
    w = random_weight("int4-32", (70, 96), 1)
    np.testing.assert_array_equal(np.float32(exact(w)), dequantized(w))
