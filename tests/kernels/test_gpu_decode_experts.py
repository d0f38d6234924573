"""Tests of the decode kernels for experts on Hopper GPUs, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.gpu import decode_experts as gpu_decode_experts
from dbrx_jax.kernels.gpu import integer_experts
from dbrx_jax.kernels.gpu.integer_products import IntegerTiles
from dbrx_jax.ops.experts import ACTIVATIONS
from tests.kernels.gpu import INTERPRET, copied_bytes, fresh_interpreter, max_error  # noqa: F401
from tests.kernels.weights import shape_of, to_float32, weight_of

FORMATS = ("int8", "fp8", "int4", "int4-32", "int4-64", "int4-128")
# Model widths: eight groups of scales are the least that TMA copies.
WIDTHS = {"int4": 256, "int4-32": 256, "int4-64": 512, "int4-128": 1024}


def sizes(fmt):
    return (128, WIDTHS[fmt]) if fmt in WIDTHS else (192, 128)


def limit(fmt, dtype=jnp.bfloat16):
    """Returns the largest error allowed: activations of integer products are rounded to 15 bits, others to bfloat16."""
    return 1e-5 if dtype == jnp.float32 else 1e-3 if fmt.startswith("int") else 1e-2


def experts(fmt, E, F, D, dtype=jnp.bfloat16):
    return [weight_of((E, F, D), fmt, c, dtype, seed) for seed, c in enumerate((1, 1, 0))]


def shapes(fmt, E, F, D):
    return [shape_of((E, F, D), fmt, c) for c in (1, 1, 0)]


def run(x, active, count, combine_weights, weights, activation="silu", tiles=None):
    assert gpu_decode_experts.supports(x, *weights, interpret=True)
    active = jnp.array(active, jnp.int32)
    function = jax.jit(
        lambda *a: gpu_decode_experts.decode_experts(*a, activation=activation, tiles=tiles, interpret=INTERPRET)
    )
    return np.asarray(function(x, active, jnp.int32(count), jnp.asarray(combine_weights, jnp.float32), *weights))


def reference(x, active, count, combine_weights, weights, activation="silu"):
    w1, v1, w2 = map(to_float32, weights)
    y, x = np.zeros(x.shape, np.float32), to_float32(x)
    for i, e in enumerate(active[:count]):
        mask = np.asarray(combine_weights)[i] != 0
        inner = np.asarray(ACTIVATIONS[activation](x[mask] @ w1[e].T)) * (x[mask] @ v1[e].T)
        y[mask] += np.asarray(combine_weights)[i, mask, None] * (inner @ w2[e])
    return y


def random_rows(N, D, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(7), (N, D)).astype(dtype)


def random_combine(C, N):
    combine_weights = np.random.default_rng(0).uniform(0.1, 1, (C, N)).astype(np.float32)
    combine_weights[np.arange(C), np.arange(C) % N] = 0
    return combine_weights


@pytest.mark.parametrize(
    ("fmt", "dtype", "activation"),
    [
        ("plain", jnp.bfloat16, "silu"),
        ("plain", jnp.float32, "gelu"),
        ("int8", jnp.bfloat16, "relu"),
        ("fp8", jnp.bfloat16, "silu"),
        ("int4", jnp.bfloat16, "silu"),
        ("int4-32", jnp.bfloat16, "silu"),
        ("int4-64", jnp.bfloat16, "silu"),
        ("int4-128", jnp.bfloat16, "gelu"),
    ],
)
def test_decode_experts_match_reference(fmt, dtype, activation):
    F, D = sizes(fmt)
    weights, x = experts(fmt, 3, F, D, dtype), random_rows(3, D, dtype)
    active, combine_weights = [2, 0, 99], random_combine(3, 3)
    y = run(x, active, 2, combine_weights, weights, activation)
    assert y.dtype == np.float32
    error = max_error(y, reference(x, active, 2, combine_weights, weights, activation))
    assert error < limit(fmt, dtype)


@pytest.mark.slow  # a run of the interpreter takes seconds
@settings(max_examples=8)
@given(st.sampled_from(["plain", *FORMATS]), st.integers(1, 20), st.permutations(range(4)), st.integers(0, 4))
@example("int8", 9, [3, 1, 2, 0], 4)
@example("int8", 1, [3, 1, 2, 0], 0)
def test_random_tokens_and_experts_match_reference(fmt, N, active, count):
    F, D = sizes(fmt)
    weights, x, combine_weights = experts(fmt, 4, F, D), random_rows(N, D), random_combine(4, N)
    y = run(x, active, count, combine_weights, weights)
    if count == 0:
        np.testing.assert_array_equal(y, 0)
    assert max_error(y, reference(x, active, count, combine_weights, weights)) < limit(fmt)


@pytest.mark.parametrize("fused", [False, True])
def test_more_rows_than_an_entry_match_reference(fused, monkeypatch):
    """20 rows, of which one expert has all, are in entries of 10; the others have none or a few."""
    monkeypatch.setattr(integer_experts, "FUSED_BLOCKS", 0 if fused else 10**6)
    F, D = sizes("int4-64")
    weights, x = experts("int4-64", 4, F, D), random_rows(20, D)
    combine_weights = np.zeros((3, 20), np.float32)
    combine_weights[0], combine_weights[2, 17:] = np.linspace(0.1, 1, 20), 0.5
    y = run(x, [3, 1, 0], 3, combine_weights, weights)
    assert max_error(y, reference(x, [3, 1, 0], 3, combine_weights, weights)) < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("fmt", "bad"), [("int8", np.inf), ("int4-64", np.nan)])
def test_non_finite_row_does_not_change_other_rows(fmt, bad):
    D = 512
    weights, combine_weights = experts(fmt, 2, 128, D), np.array([[1, 0, 0.5], [0.5, 0, 1]], np.float32)
    x = random_rows(3, D).at[1].set(bad)
    y = run(x, [0, 1], 2, combine_weights, weights)
    np.testing.assert_array_equal(y[1], 0)
    assert max_error(y, reference(x, [0, 1], 2, combine_weights, weights)) < 1e-2


def test_split_and_tiled_decode_matches_reference():
    weights, x, combine_weights = experts("fp8", 2, 128, 256), random_rows(2, 256), random_combine(2, 2)
    T = gpu_decode_experts.DecodeTiles
    y = run(x, [1, 0], 2, combine_weights, weights, tiles=(T(128, 32, 3, 2), T(64, 32, 2, 2)))
    assert max_error(y, reference(x, [1, 0], 2, combine_weights, weights)) < 1e-2


@pytest.mark.parametrize("fmt", ["int8", "int4-64"])
def test_split_integer_products_match_reference(fmt):
    weights, x, combine_weights = experts(fmt, 2, 512, 512), random_rows(2, 512), random_combine(2, 2)
    T = IntegerTiles
    y = run(x, [1, 0], 2, combine_weights, weights, tiles=(T(64, 3, 1), T(64, 2, 2)))
    assert max_error(y, reference(x, [1, 0], 2, combine_weights, weights)) < 1e-3


@pytest.mark.parametrize(("fmt", "count"), [("plain", 2), ("fp8", 1), ("int8", 0), ("int8", 2), ("int4-64", 1)])
def test_only_active_experts_are_copied_and_once(fmt, count, copied_bytes):  # noqa: F811
    F, D = sizes(fmt)
    weights, x = experts(fmt, 3, F, D), random_rows(3, D)
    run(x, [2, 0, 1], count, random_combine(3, 3), weights)
    gate, up, down = (count * (w.nbytes if fmt == "plain" else w.values.nbytes) // 3 for w in weights)
    if fmt.startswith("int"):
        assert copied_bytes["in", "int16"] == down
        weight_type = "uint8" if fmt.startswith("int4") else "int8"
        digits = 2 * 4 * count * (F // 64 * 2 * D + D // 128 * F)  # of four rows, for each tile of channels
        digits *= 2 if fmt == "int4-64" else 1  # once for each group of a block
        assert copied_bytes["in", "int8"] == digits + (gate + up if weight_type == "int8" else 0)
        assert copied_bytes["in", weight_type] >= gate + up
    elif fmt == "fp8":
        assert copied_bytes["in", "int16"] == gate + up + down
    else:
        rows = 8 * 2 * count * (F // 64 * D + D // 64 * F)
        assert copied_bytes["in", "bfloat16"] == gate + up + down + rows


def test_supports_rejects_unsupported_operands():
    weights, x = experts("int8", 2, 128, 256), random_rows(3, 256)
    assert gpu_decode_experts.supports(x, *weights)
    assert gpu_decode_experts.supports(x, *experts("int4-32", 2, 128, 256))
    assert not gpu_decode_experts.supports(random_rows(65, 256), *weights)
    assert not gpu_decode_experts.supports(x.astype(jnp.float32), *weights)
    assert not gpu_decode_experts.supports(x, *experts("int8", 2, 100, 256))
    assert not gpu_decode_experts.supports(x, *experts("int4-64", 2, 128, 256))  # four scales are too few to copy
    assert not gpu_decode_experts.supports(x.astype(jnp.float32), *experts("plain", 2, 128, 256, jnp.float32))


@pytest.mark.parametrize("fmt", ["plain", *FORMATS])
@pytest.mark.parametrize("F", [10752, 2688])
def test_default_tiles_of_dbrx_fill_the_gpu(fmt, F):
    D, E = 6144, 16
    weights = shapes(fmt, E, F, D)
    assert gpu_decode_experts.supports(jax.ShapeDtypeStruct((1, D), jnp.bfloat16), *weights)
    products = integer_experts if fmt.startswith("int") else gpu_decode_experts
    gate, up, down = products.packed_shapes(*weights)
    for group in ((gate, up), (down,)):
        tiles, weight = products.default_tiles(group, 8, 4), group[0]
        # Four experts; gate and up of integers have blocks of their own.
        blocks = 4 * weight.channels // 64 * tiles.splits * (len(group) if fmt.startswith("int") else 1)
        assert blocks >= 2 * gpu_decode_experts.MULTIPROCESSORS
        assert weight.depth % (tiles.depth * tiles.splits) == 0
