"""The experts' decode kernels for Hopper GPUs, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.gpu import decode_experts as gpu_decode_experts
from dbrx_jax.kernels.gpu import packed_weights
from dbrx_jax.ops.experts import ACTIVATIONS
from tests.kernels.gpu import INTERPRET, copied, error, fresh_interpreter  # noqa: F401
from tests.kernels.weights import floats, shape_of, stored_bytes, weight_of

FORMS = ("int8", "fp8", "int4", "int4-64", "int4-128")


def experts(form, E, F, D, dtype=jnp.bfloat16):
    return [weight_of((E, F, D), form, c, dtype, seed) for seed, c in enumerate((1, 1, 0))]


def shapes(form, E, F, D):
    return [shape_of((E, F, D), form, c) for c in (1, 1, 0)]


def run(x, chosen, count, combine_weights, weights, activation="silu", tiles=None):
    assert gpu_decode_experts.supports(x, *weights, interpret=True)
    chosen = jnp.array(chosen, jnp.int32)
    function = jax.jit(
        lambda *a: gpu_decode_experts.decode_experts(*a, activation=activation, tiles=tiles, interpret=INTERPRET)
    )
    return np.asarray(function(x, chosen, jnp.int32(count), jnp.asarray(combine_weights, jnp.float32), *weights))


def reference(x, chosen, count, combine_weights, weights, activation="silu"):
    w1, v1, w2 = map(floats, weights)
    y, x = np.zeros(x.shape, np.float32), floats(x)
    for c, e in enumerate(chosen[:count]):
        own = np.asarray(combine_weights)[c] != 0
        inner = np.asarray(ACTIVATIONS[activation](x[own] @ w1[e].T)) * (x[own] @ v1[e].T)
        y[own] += np.asarray(combine_weights)[c, own, None] * (inner @ w2[e])
    return y


def rows(N, D, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(7), (N, D)).astype(dtype)


def mixes(C, N):
    combine_weights = np.random.default_rng(0).uniform(0.1, 1, (C, N)).astype(np.float32)
    combine_weights[np.arange(C), np.arange(C) % N] = 0
    return combine_weights


@pytest.mark.parametrize(
    ("form", "dtype", "activation"),
    [
        ("plain", jnp.bfloat16, "silu"),
        ("plain", jnp.float32, "gelu"),
        ("int8", jnp.bfloat16, "relu"),
        ("fp8", jnp.bfloat16, "silu"),
        ("int4", jnp.bfloat16, "silu"),
        ("int4-64", jnp.bfloat16, "silu"),
        ("int4-128", jnp.bfloat16, "gelu"),
    ],
)
def test_decode_is_the_sum_of_the_chosen_experts(form, dtype, activation):
    F, D = (128, 256) if form.startswith("int4") else (192, 128)
    weights, x, chosen, combine_weights = experts(form, 3, F, D, dtype), rows(3, D, dtype), [2, 0, 99], mixes(3, 3)
    y = run(x, chosen, 2, combine_weights, weights, activation)
    assert y.dtype == np.float32
    assert error(y, reference(x, chosen, 2, combine_weights, weights, activation)) < (
        1e-5 if dtype == jnp.float32 else 1e-2
    )


@pytest.mark.slow  # a run of the interpreter takes seconds
@settings(max_examples=8)
@given(st.sampled_from(["plain", *FORMS]), st.integers(1, 20), st.permutations(range(4)), st.integers(0, 4))
@example("int8", 9, [3, 1, 2, 0], 4)
@example("int8", 1, [3, 1, 2, 0], 0)
def test_any_number_of_tokens_and_experts(form, N, chosen, count):
    F, D = (128, 256) if form.startswith("int4") else (64, 128)
    weights, x, combine_weights = experts(form, 4, F, D), rows(N, D), mixes(4, N)
    y = run(x, chosen, count, combine_weights, weights)
    if count == 0:
        np.testing.assert_array_equal(y, 0)
    assert error(y, reference(x, chosen, count, combine_weights, weights)) < 1e-2


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("form", "bad"), [("int8", np.inf), ("int4-64", np.nan)])
def test_a_row_that_is_not_finite_spoils_no_other_and_no_expert_it_did_not_choose(form, bad):
    D = 256
    weights, combine_weights = experts(form, 2, 128, D), np.array([[1, 0, 0.5], [0.5, 0, 1]], np.float32)
    x = rows(3, D).at[1].set(bad)
    y = run(x, [0, 1], 2, combine_weights, weights)
    np.testing.assert_array_equal(y[1], 0)
    assert error(y, reference(x, [0, 1], 2, combine_weights, weights)) < 1e-2


@pytest.mark.parametrize("form", ["int8", "int4-64"])
def test_splits_and_tiles_change_nothing_but_rounding(form):
    D = 512 if form == "int4-64" else 256
    weights, x, combine_weights = experts(form, 2, 128, D), rows(2, D), mixes(2, 2)
    T = gpu_decode_experts.DecodeTiles
    y = run(x, [1, 0], 2, combine_weights, weights, tiles=(T(128, 32, 3, 2), T(64, 32, 2, 2)))
    assert error(y, reference(x, [1, 0], 2, combine_weights, weights)) < 1e-2


def test_words_are_every_value_exactly():
    """Each byte that a quantised weight can be, through the arithmetic on words."""
    every = np.arange(256, dtype=np.uint8).reshape(1, 128, 2)
    word = jnp.asarray(every.view(np.int16)[..., 0])
    low, high = every[..., 0], every[..., 1]
    for found, value in zip(packed_weights.unpack(word, "int8"), (low, high), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), value.view(np.int8))
    nibbles = [low & 15, low >> 4, high & 15, high >> 4]
    factors = packed_weights.FACTORS["int4"]
    for found, nibble, factor in zip(packed_weights.unpack(word, "int4"), nibbles, factors, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32) * factor, (nibble.astype(np.int8) ^ 8) - 8)
    for found, value in zip(packed_weights.unpack(word, "fp8"), (low, high), strict=True):
        expected = np.asarray(value.view(jnp.float8_e4m3fn), np.float32)
        real = ~np.isnan(expected)
        np.testing.assert_array_equal(np.asarray(found, np.float32)[real], expected[real])


@pytest.mark.parametrize(("form", "count"), [("plain", 2), ("int8", 0), ("int8", 2), ("int4-64", 1)])
def test_bytes_are_those_of_the_copies(form, count, copied):  # noqa: F811
    D = 256 if form == "int4-64" else 128
    weights, x = experts(form, 3, 64, D), rows(3, D)
    run(x, [2, 0, 1], count, mixes(3, 3), weights)
    expected = gpu_decode_experts.decode_bytes(x, np.zeros(3), count, *weights)
    if form == "plain":
        assert copied["in", "bfloat16"] == expected.weights + expected.activations
    else:
        assert copied["in", "int16"] == expected.weights
        assert copied["in", "bfloat16"] == expected.activations
    assert copied["out"] == expected.written
    assert expected.weights == count * sum(w.nbytes if form == "plain" else w.values.nbytes for w in weights) // 3


@pytest.mark.parametrize("form", ["plain", "int8", "int4-128"])
@pytest.mark.parametrize("E", [16, 2, 1])
@pytest.mark.parametrize("N", [1, 8, 64])
def test_with_all_experts_a_call_reads_its_weights_once(form, E, N):
    """At published sizes, as the count of a whole program's bytes takes it. Scales by channel are few."""
    weights, x = shapes(form, E, 10752, 6144), jax.ShapeDtypeStruct((N, 6144), jnp.bfloat16)
    read = gpu_decode_experts.decode_bytes(x, np.zeros(E), E, *weights)
    assert read.weights + read.scales == pytest.approx(sum(map(stored_bytes, weights)), rel=0.015)


def test_what_it_does_not_take_is_said():
    weights, x = experts("int8", 2, 128, 256), rows(3, 256)
    assert gpu_decode_experts.supports(x, *weights)
    assert not gpu_decode_experts.supports(rows(65, 256), *weights)
    assert not gpu_decode_experts.supports(x.astype(jnp.float32), *weights)
    assert not gpu_decode_experts.supports(x, *experts("int8", 2, 100, 256))
    assert not gpu_decode_experts.supports(x, *experts("int4-32", 2, 128, 256))
    assert not gpu_decode_experts.supports(x.astype(jnp.float32), *experts("plain", 2, 128, 256, jnp.float32))


@pytest.mark.parametrize("form", ["plain", *FORMS])
@pytest.mark.parametrize("F", [10752, 2688])
def test_dbrx_has_tiles_that_fill_the_card(form, F):
    D, E = 6144, 16
    weights = shapes(form, E, F, D)
    assert gpu_decode_experts.supports(jax.ShapeDtypeStruct((1, D), jnp.bfloat16), *weights)
    for w, c, n in zip(weights, (1, 1, 0), (2, 2, 1), strict=True):
        taken = jax.eval_shape(lambda w, c=c: packed_weights.pack(w, c), w)
        tiles = gpu_decode_experts.default_tiles((taken,) * n, 8, 4)
        assert 4 * (taken.channels // tiles.channels) * tiles.splits >= 2 * gpu_decode_experts.MULTIPROCESSORS
        assert taken.depth % (tiles.depth * tiles.splits) == 0
