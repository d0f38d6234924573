"""Attention through a cache against the plain one, rotary embeddings and normalisation against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.cache import to_int8
from dbrx_jax.ops.attention import cached_attention, join_stripes, reference_attention
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.rope import rotate
from dbrx_jax.sharding import ONE_DEVICE

H, G, K = 6, 2, 10  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=5)
def cached(query, key, value, positions, first_row, block):
    return join_stripes(cached_attention(query, key, value, positions, first_row, block), query.dtype, ONE_DEVICE)


@settings(max_examples=12)
@given(st.integers(0, 99), st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 5), st.data())
def test_cached_matches_reference(seed, block, rows, new, data):
    S, B = 24, 4
    first_row = data.draw(st.integers(0, B - rows))
    start = np.array(data.draw(st.lists(st.integers(0, S - new), min_size=rows, max_size=rows)))
    q, k, v = random(seed, rows, new, H, K), random(seed + 1, B, G, S, K), random(seed + 2, B, G, S, K)
    positions = start[:, None] + np.arange(new)
    mask = np.arange(S) <= positions[:, :, None]
    mine = slice(first_row, first_row + rows)
    want = reference_attention(q, k[mine].swapaxes(1, 2), v[mine].swapaxes(1, 2), mask)
    # What lies beyond a row's positions must not matter, whatever it is.
    for r, row in enumerate(range(first_row, first_row + rows)):
        beyond = int(positions[r, -1]) + 1
        k[row, :, beyond:], v[row, :, beyond:] = 1e4, -1e4
    np.testing.assert_allclose(cached(q, k, v, positions, first_row, block), want, rtol=1e-5, atol=1e-5)


def test_cached_bits_do_not_depend_on_the_caches_length_or_the_other_rows():
    q, k, v = random(0, 2, 1, H, K), random(1, 2, G, 48, K), random(2, 2, G, 48, K)
    long = cached(q, k, v, np.array([[5], [47]]), 0, 8)
    short = cached(q, k[:, :, :8], v[:, :, :8], np.array([[5], [2]]), 0, 8)
    np.testing.assert_array_equal(long[0], short[0])


def test_an_int8_cache_is_near():
    q, k, v = random(0, 2, 1, H, K), random(1, 2, 32, G, K), random(2, 2, 32, G, K)
    positions = np.array([[5], [31]])
    (k8, k_scale), (v8, v_scale) = to_int8(jnp.asarray(k)), to_int8(jnp.asarray(v))
    assert np.abs(k8).max() == 127
    # Rounded to a whole number, and the scale to eight bits.
    np.testing.assert_allclose(np.float32(k8) * np.float32(k_scale)[..., None], k, atol=np.abs(k).max() * 1.5 / 127)
    turned = [jnp.swapaxes(a, 1, 2) for a in (k8, v8, k_scale, v_scale)]
    part = cached_attention(q, *turned[:2], positions, 0, 8, scales=tuple(turned[2:]))
    out = join_stripes(part, q.dtype, ONE_DEVICE)
    exact = [np.float32(a) * np.float32(s)[..., None] for a, s in ((k8, k_scale), (v8, v_scale))]
    mask = np.arange(32) <= positions[:, :, None]
    np.testing.assert_allclose(out, reference_attention(q, *exact, mask), rtol=1e-5, atol=1e-5)


def test_query_head_reads_its_own_kv_head():
    q, k = random(0, 1, 3, H, K), random(1, 1, 3, G, K)
    v = np.broadcast_to(np.arange(G, dtype=np.float32)[:, None], (1, 3, G, K))
    out = reference_attention(q, k, v, np.ones((1, 3, 3), bool))
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 0, 0, 1, 1, 1], rtol=1e-6)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v = random(0, 1, 2, H, K), random(1, 1, 2, G, K), random(2, 1, 2, G, K)
    assert np.isfinite(reference_attention(q, k, v, np.zeros((1, 2, 2), bool))).all()


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotate_is_a_rotation_of_halves(theta):
    x = random(3, 2, 5, H, K)
    positions = np.array([[0, 1, 2, 3, 30000], [7, 8, 9, 10, 11]])
    z = x[..., : K // 2] + 1j * x[..., K // 2 :]
    angle = positions[:, :, None, None] * theta ** (-2.0 * np.arange(K // 2) / K)
    turned = z * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    # float32 angles of up to 30000 radians are good to 2e-3.
    np.testing.assert_allclose(rotate(x, positions, theta), want, atol=5e-3)
    np.testing.assert_allclose(rotate(x, positions, theta)[:, :3], want[:, :3], atol=1e-5)


def test_rotate_keeps_float32_angles_in_bfloat16():
    x, positions = random(3, 1, 1, H, K), np.array([[20000]])
    low = rotate(jnp.asarray(x, jnp.bfloat16), positions, 5e5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), rotate(x, positions, 5e5), atol=0.05)


def test_layer_norm():
    x, scale = random(4, 3, 7, 20) * 5 + 30, random(5, 20)
    y = np.float64(x)
    want = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layer_norm(x, scale), want, rtol=1e-4, atol=1e-4)
    low = layer_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
