"""Tests of GPU sequence attention, with JAX's implementation instead of cuDNN, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.gpu import sequence_attention as gpu_sequence_attention
from dbrx_jax.ops.attention import reference_attention

H, G, K = 6, 2, 24  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kernel(query, key, value, valid):
    return gpu_sequence_attention.sequence_attention(query, key, value, valid, jnp.int32(0), interpret=True)


def masked_reference(query, key, value, valid):
    mask = np.tril(np.ones((valid.shape[1],) * 2, bool)) & valid[:, None]
    return jnp.where(valid[..., None, None], reference_attention(query, key, value, mask), 0)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, valid, arrays, grad):
    out, vjp = jax.vjp(lambda *x: function(*x, valid), *arrays)
    return [x.astype(jnp.float32) for x in (out, *vjp(grad))]


def random_inputs(seed, batch, tokens, dtype=jnp.float32):
    """Returns random query, key, value and gradient of the result."""
    return [jnp.asarray(random(seed + i, batch, tokens, n, K), dtype) for i, n in enumerate((H, G, G, H))]


@settings(max_examples=12)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0]))
def test_random_padding_matches_reference_and_gradients(seed, density):
    """Covers rows with gaps, with few tokens, and without tokens."""
    *arrays, grad = random_inputs(seed, 3, 23)
    valid = np.random.default_rng(seed).random((3, 23)) < density
    results = (with_gradients(function, valid, arrays, grad) for function in (kernel, masked_reference))
    for got, want in zip(*results, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3)


def test_bfloat16_with_padding_is_close_to_reference():
    *arrays, grad = random_inputs(0, 2, 40, jnp.bfloat16)
    positions = np.arange(40)
    valid = np.stack([positions >= 7, positions < 29])
    got = with_gradients(kernel, valid, arrays, grad)
    want = with_gradients(masked_reference, valid, [a.astype(jnp.float32) for a in arrays], grad.astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def test_undefined_padding_results_are_ignored(monkeypatch):
    """cuDNN may leave results and gradients of padding undefined."""

    @jax.custom_vjp
    def attend(q, k, v, padding):
        return jnp.where(padding, jnp.nan, masked(q, k, v, padding))

    def masked(q, k, v, padding):
        return reference_attention(q, k, v, np.tril(np.ones((q.shape[1],) * 2, bool)) & ~padding[:, None, :, 0, 0])

    def backward(residuals, grad):
        *arrays, padding = residuals
        _, vjp = jax.vjp(lambda *x: masked(*x, padding), *arrays)
        return *(jnp.where(padding, jnp.nan, x) for x in vjp(grad)), None

    attend.defvjp(lambda *x: (attend(*x), x), backward)

    def fake_cudnn(query, key, value, query_seq_lengths, **_):
        padding = jnp.arange(query.shape[1])[:, None, None] >= query_seq_lengths[:, None, None, None]
        return attend(query, key, value, padding)

    monkeypatch.setattr(gpu_sequence_attention.jax.nn, "dot_product_attention", fake_cudnn)
    *arrays, grad = random_inputs(0, 2, 9)
    valid = np.stack([np.arange(9) % 3 > 0, np.arange(9) < 0])
    results = (with_gradients.__wrapped__(function, valid, arrays, grad) for function in (kernel, masked_reference))
    for got, want in zip(*results, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_infinite_padding_and_row_do_not_change_other_rows():
    *arrays, grad = random_inputs(0, 2, 9)
    valid = np.stack([np.arange(9) % 4 > 0, np.arange(9) < 9])
    clean = with_gradients(kernel, valid, arrays, grad)
    dirty = with_gradients(kernel, valid, [x.at[1].set(jnp.inf).at[0, ::4].set(jnp.inf) for x in arrays], grad)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.parametrize("changed", [{"K": 256}, {"queries": 64}, {"tokens": 63}, {"dtype": "float32"}])
def test_supports_rejects_unsupported_shapes(changed):
    def supported(K=128, tokens=128, queries=None, dtype="bfloat16"):
        query = jax.ShapeDtypeStruct((1, queries or tokens, H, K), dtype)
        key = jax.ShapeDtypeStruct((1, tokens, G, K), dtype)
        return gpu_sequence_attention.supports(query, key, key)

    assert supported()
    assert not supported(**changed)
