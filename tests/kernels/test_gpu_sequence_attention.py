"""Attention of whole sequences on a GPU, with JAX's own in cuDNN's place, against the plain definition."""

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


def fast(query, key, value, valid):
    return gpu_sequence_attention.sequence_attention(query, key, value, valid, jnp.int32(0), interpret=True)


def plain(query, key, value, valid):
    mask = np.tril(np.ones((valid.shape[1],) * 2, bool)) & valid[:, None]
    return jnp.where(valid[..., None, None], reference_attention(query, key, value, mask), 0)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, valid, arrays, grad):
    out, pull = jax.vjp(lambda *x: function(*x, valid), *arrays)
    return [x.astype(jnp.float32) for x in (out, *pull(grad))]


def drawn(seed, batch, tokens, dtype=jnp.float32):
    """Query, key, value and the result's gradient."""
    return [jnp.asarray(random(seed + i, batch, tokens, n, K), dtype) for i, n in enumerate((H, G, G, H))]


@settings(max_examples=12)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0]))
def test_any_padding_matches_the_definition_with_its_gradients(seed, share):
    """Rows with holes, of few tokens, and without any."""
    *arrays, grad = drawn(seed, 3, 23)
    valid = np.random.default_rng(seed).random((3, 23)) < share
    results = (with_gradients(function, valid, arrays, grad) for function in (fast, plain))
    for got, want in zip(*results, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3)


def test_padding_on_either_side_in_bfloat16_is_near():
    *arrays, grad = drawn(0, 2, 40, jnp.bfloat16)
    places = np.arange(40)
    valid = np.stack([places >= 7, places < 29])
    got = with_gradients(fast, valid, arrays, grad)
    want = with_gradients(plain, valid, [a.astype(jnp.float32) for a in arrays], grad.astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def test_what_lies_behind_a_rows_length_spoils_nothing(monkeypatch):
    """cuDNN need not write there, neither results nor gradients."""

    @jax.custom_vjp
    def attend(q, k, v, beyond):
        return jnp.where(beyond, jnp.nan, seen(q, k, v, beyond))

    def seen(q, k, v, beyond):
        return reference_attention(q, k, v, np.tril(np.ones((q.shape[1],) * 2, bool)) & ~beyond[:, None, :, 0, 0])

    def backward(kept, grad):
        *arrays, beyond = kept
        _, pull = jax.vjp(lambda *x: seen(*x, beyond), *arrays)
        return *(jnp.where(beyond, jnp.nan, x) for x in pull(grad)), None

    attend.defvjp(lambda *x: (attend(*x), x), backward)

    def careless(query, key, value, query_seq_lengths, **_):
        beyond = jnp.arange(query.shape[1])[:, None, None] >= query_seq_lengths[:, None, None, None]
        return attend(query, key, value, beyond)

    monkeypatch.setattr(gpu_sequence_attention.jax.nn, "dot_product_attention", careless)
    *arrays, grad = drawn(0, 2, 9)
    valid = np.stack([np.arange(9) % 3 > 0, np.arange(9) < 0])
    results = (with_gradients.__wrapped__(function, valid, arrays, grad) for function in (fast, plain))
    for got, want in zip(*results, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_infinite_padding_and_an_infinite_row_spoil_no_other():
    *arrays, grad = drawn(0, 2, 9)
    valid = np.stack([np.arange(9) % 4 > 0, np.arange(9) < 9])
    clean = with_gradients(fast, valid, arrays, grad)
    dirty = with_gradients(fast, valid, [x.at[1].set(jnp.inf).at[0, ::4].set(jnp.inf) for x in arrays], grad)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.parametrize("changed", [{"K": 256}, {"queries": 64}, {"tokens": 63}, {"dtype": "float32"}])
def test_what_does_not_fit_is_not_supported(changed):
    def supported(K=128, tokens=128, queries=None, dtype="bfloat16"):
        query = jax.ShapeDtypeStruct((1, queries or tokens, H, K), dtype)
        key = jax.ShapeDtypeStruct((1, tokens, G, K), dtype)
        return gpu_sequence_attention.supports(query, key, key)

    assert supported()
    assert not supported(**changed)
