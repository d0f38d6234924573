"""Tests of attention against its definition, and of rotary embeddings and layer normalisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.errors import ConfigError
from dbrx_jax.kernels import attention
from dbrx_jax.kernels.attention import cached_attention, select_implementation, sequence_attention
from dbrx_jax.kernels.xla.sequence_attention import blockwise_attention
from dbrx_jax.model.cache import LayerCache, quantize_to_int8, stored_dtype, write_cache
from dbrx_jax.ops.attention import merge_partial_attention, reference_attention, reference_cached_attention
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.rope import rotate
from dbrx_jax.sharding.partition import ONE_DEVICE
from tests.conftest import GOLDEN
from tests.kernels.paged import paged

H, G, K = 6, 2, 10  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def attend_to_cache(query, key, value, positions, table, scales=None):
    part = cached_attention(query, key, value, positions, table, scales=scales)
    return merge_partial_attention(part, query.dtype, ONE_DEVICE)


@settings(max_examples=12)
@given(st.integers(0, 99), st.sampled_from([(4, 1, 5), (8, 3, 1), (4, 3, 2)]), st.data())
def test_cached_attention_matches_reference(seed, sizes, data):
    (block, rows, new), S = sizes, 24
    start = np.array(data.draw(st.lists(st.integers(0, S - new), min_size=rows, max_size=rows)))
    q, k, v = random(seed, rows, new, H, K), random(seed + 1, rows, G, S, K), random(seed + 2, rows, G, S, K)
    positions = start[:, None] + np.arange(new)
    mask = np.arange(S) <= positions[:, :, None]
    want = reference_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    # Values after a row's last position must not change the result.
    for row in range(rows):
        beyond = int(positions[row, -1]) + 1
        k[row, :, beyond:], v[row, :, beyond:] = 1e4, -1e4
    (k, v), table = paged((k, v), block, seed)
    np.testing.assert_allclose(attend_to_cache(q, k, v, positions, table), want, rtol=1e-5, atol=1e-5)


def test_cached_attention_bits_do_not_depend_on_the_table_or_other_rows():
    q, k, v = random(0, 2, 1, H, K), random(1, 2, G, 48, K), random(2, 2, G, 48, K)
    (long_k, long_v), long_table = paged((k, v), 8)
    long = attend_to_cache(q, long_k, long_v, np.array([[5], [47]]), long_table)
    (short_k, short_v), short_table = paged((k[:, :, :8], v[:, :, :8]), 8, seed=1)
    short = attend_to_cache(q, short_k, short_v, np.array([[5], [2]]), short_table)
    np.testing.assert_array_equal(long[0], short[0])


def test_a_cpu_cache_holds_bfloat16_as_integers_of_the_same_bits():
    q, k, v = random(0, 2, 1, H, K), random(1, 2, G, 16, K), random(2, 2, G, 16, K)
    pools, table = paged([np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in (k, v)], 8)
    positions = np.array([[5], [15]])
    want = attend_to_cache(q, *pools, positions, table)
    assert stored_dtype(jnp.bfloat16, "cpu") == np.uint16
    as_integers = [jax.lax.bitcast_convert_type(a, jnp.uint16) for a in pools]
    np.testing.assert_array_equal(attend_to_cache(q, *as_integers, positions, table), want)
    reference = reference_cached_attention(q, *as_integers, positions, table, (0, 1), None)
    np.testing.assert_allclose(merge_partial_attention(reference, q.dtype, ONE_DEVICE), want, rtol=1e-5, atol=1e-5)


def test_int8_cache_matches_dequantised_reference():
    q, k, v = random(0, 2, 1, H, K), random(1, 2, 32, G, K), random(2, 2, 32, G, K)
    positions = np.array([[5], [31]])
    (k8, k_scale), (v8, v_scale) = quantize_to_int8(jnp.asarray(k)), quantize_to_int8(jnp.asarray(v))
    assert np.abs(k8).max() == 127
    # Values are rounded to integers and scales to eight bits.
    np.testing.assert_allclose(np.float32(k8) * np.float32(k_scale)[..., None], k, atol=np.abs(k).max() * 1.5 / 127)
    pools, table = paged([jnp.swapaxes(a, 1, 2) for a in (k8, v8, k_scale, v_scale)], 8)
    out = attend_to_cache(q, *pools[:2], positions, table, tuple(pools[2:]))
    exact = [np.float32(a) * np.float32(s)[..., None] for a, s in ((k8, k_scale), (v8, v_scale))]
    mask = np.arange(32) <= positions[:, :, None]
    np.testing.assert_allclose(out, reference_attention(q, *exact, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_write_cache_stores_every_valid_position_in_any_layout(int8, tokens, monkeypatch):
    """Writes every second position from 1 on, to blocks of 8; a TPU writes two int8 heads one by one."""
    monkeypatch.setenv("DBRX_KERNELS", "0")  # test_tpu_cache_write.py tests the kernel
    new_kv = jnp.asarray(random(0, 2, tokens, G, K)), jnp.asarray(random(1, 2, tokens, G, K))
    table, valid = np.array([[4, 2, 0], [1, 5, 3]]), np.arange(tokens) < np.array([[tokens], [max(1, tokens - 9)]])
    positions = np.array([[16], [32]] if tokens == 16 else [[4], [31]]) + np.arange(tokens)
    empty = [jnp.full((6, G, 8, K), 9, jnp.int8 if int8 else jnp.float32)] * 2
    empty += [jnp.full((6, G, 8), 9, jnp.bfloat16)] * (2 * int8)
    want = [np.array(x) for x in empty]
    (key, key_scale), (value, value_scale) = map(quantize_to_int8, new_kv)
    for array, x in zip(want, (key, value, key_scale, value_scale) if int8 else new_kv, strict=True):
        for r, t in np.ndindex(2, tokens):
            if positions[r, t] % 2 == 1 and valid[r, t]:
                local = positions[r, t] // 2
                array[table[r, local // 8], :, local % 8] = x[r, t]
    for platform in ("cpu", "tpu"):
        arrays = map(jnp.asarray, (valid, positions, table))
        got = write_cache(LayerCache(*empty), *new_kv, *arrays, (1, 2), platform=platform)
        for a, b in zip((x for x in got if x is not None), want, strict=True):
            if tokens == 16:  # behind a row's valid tokens is padding, within the block
                np.testing.assert_array_equal(a[1:3, :, :4], b[1:3, :, :4])
                np.testing.assert_array_equal(np.asarray(a)[[0, 4, 5]], b[[0, 4, 5]])
            else:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_chunk_shorter_than_a_block_is_written_inside_it(platform):
    """Positions 48 to 63 are local positions 24 to 31 of either shard, in the row's second block of 16."""
    new, scale = jnp.asarray(random(0, 1, 16, G, K)), 1 / 127
    cache = LayerCache(*[jnp.zeros((4, G, 16, K), jnp.int8)] * 2, *[jnp.zeros((4, G, 16), jnp.bfloat16)] * 2)
    positions, valid = jnp.arange(48, 64)[None], jnp.ones((1, 16), bool)
    got = write_cache(cache, new, new, valid, positions, jnp.array([[1, 3]]), (1, 2), platform)
    written = np.zeros((4, 16), bool)
    written[3, 8:] = True
    for pool, axes in ((got.key, (1, 3)), (got.value_scale, 1)):
        np.testing.assert_array_equal(np.asarray(pool).any(axis=axes), written)
    exact = np.asarray(new)[0, 1::2].swapaxes(0, 1)
    restored = np.float32(got.key)[3, :, 8:] * np.float32(got.key_scale)[3, :, 8:, None]
    np.testing.assert_allclose(restored, exact, atol=1.5 * scale * np.abs(exact).max())


def test_pieces_of_padding_are_written_to_the_spare_block_as_zeros():
    new = jnp.asarray(random(0, 2, 32, G, K))
    cache = LayerCache(*[jnp.full((5, G, 16, K), 9, jnp.float32)] * 2)
    positions, valid = jnp.zeros((2, 1), int) + jnp.arange(32), jnp.arange(32) < jnp.array([[20], [0]])
    got = write_cache(cache, new, new, valid, positions, jnp.array([[3, 1], [2, 4]])).key
    np.testing.assert_array_equal(got[3], new[0, :16].swapaxes(0, 1))
    np.testing.assert_array_equal(got[1, :, :4], new[0, 16:20].swapaxes(0, 1))
    assert not np.asarray(got[0]).any()
    assert (np.asarray(got)[[2, 4]] == 9).all()


@functools.partial(jax.jit, static_argnums=0)
def cached_part(implementation, q, k, v, positions, table, context_shard, scales):
    return cached_attention(q, k, v, positions, table, context_shard, scales=scales, implementation=implementation)


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.data())
def test_reference_and_xla_cached_attention_agree(seed, stride, new, int8, data):
    S = 8
    offset = data.draw(st.integers(0, stride - 1))
    start = data.draw(st.lists(st.integers(0, S * stride - new), min_size=2, max_size=2))
    q, k, v = random(seed, len(start), new, H, K), random(seed + 1, 2, G, S, K), random(seed + 2, 2, G, S, K)
    arrays = [k, v]
    if int8:
        (k, k_scale), (v, v_scale) = quantize_to_int8(jnp.asarray(k)), quantize_to_int8(jnp.asarray(v))
        arrays = [k, v, k_scale, v_scale]
    (k, v, *scales), table = paged(arrays, 4, seed)
    positions = np.array(start)[:, None] + np.arange(new)
    parts = [
        cached_part(name, q, k, v, positions, table, (offset, stride), tuple(scales) or None)
        for name in ("reference", "xla")
    ]
    for got, want in zip(*parts, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def masked(q, k, v, valid, first, _):
    """Returns attention by definition, and 0 for a query that attends to no position."""
    mask = (jnp.arange(k.shape[1]) <= first + jnp.arange(q.shape[1])[:, None]) & valid[:, None]
    return jnp.where(mask.any(axis=-1)[:, :, None, None], reference_attention(q, k, v, mask), 0)


@functools.partial(jax.jit, static_argnums=(0, 5))
def with_gradients(function, arrays, grad, valid, first, block):
    out, vjp = jax.vjp(lambda *x: function(*x, valid, first, block), *arrays)
    return out, *vjp(grad.astype(out.dtype))


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([(7, 3, 5), (23, 1, 8), (2, 3, 1)]), st.data())
def test_blockwise_attention_and_gradients_match_reference(seed, sizes, data):
    """Covers any padding, and queries of one of several devices."""
    tokens, parts, block = sizes
    S, first = tokens * parts, tokens * data.draw(st.integers(0, parts - 1))
    arrays = random(seed, 2, tokens, H, K), random(seed + 1, 2, S, G, K), random(seed + 2, 2, S, G, K)
    grad = random(seed + 3, 2, tokens, H, K)
    valid = np.random.default_rng(seed).random((2, S)) < data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    results = (with_gradients(f, arrays, grad, valid, first, block) for f in (masked, blockwise_attention))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_blockwise_attention_in_bfloat16_is_close_to_reference():
    arrays = [jnp.asarray(random(i, 1, 40, heads, K), jnp.bfloat16) for i, heads in ((0, H), (1, G), (2, G))]
    grad, valid = random(3, 1, 40, H, K), np.ones((1, 40), bool)
    got = with_gradients(blockwise_attention, arrays, grad, valid, 0, 16)
    want = with_gradients(masked, [a.astype(jnp.float32) for a in arrays], grad, valid, 0, 16)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.float32(a) - b).max() <= 2e-2 * np.abs(b).max()


def test_blockwise_attention_isolates_infinite_rows():
    q, k, v = random(0, 2, 9, H, K), random(1, 2, 9, G, K), random(2, 2, 9, G, K)
    valid = np.ones((2, 9), bool)
    clean = blockwise_attention(q, k, v, valid, jnp.int32(0), 4)
    q[1], k[1] = np.inf, np.inf
    np.testing.assert_array_equal(blockwise_attention(q, k, v, valid, jnp.int32(0), 4)[0], clean[0])


def test_blockwise_attention_allocates_no_square_scores():
    """Checks the forward and backward passes."""
    T, block = 64, 8
    q, k, v = random(0, 1, T, H, K), random(1, 1, T, G, K), random(2, 1, T, G, K)

    def loss(q, k, v):
        return jnp.sum(blockwise_attention(q, k, v, np.ones((1, T), bool), jnp.int32(0), block))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    assert f"{block},{block}]" in jaxpr
    assert f"{T},{T}]" not in jaxpr
    assert f"{block},{T}]" not in jaxpr


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sequence_attention_matches_reference(monkeypatch, implementation):
    for short in (1024, 8):
        monkeypatch.setattr(attention, "SHORT_SEQUENCE", short)
        q, k, v = random(0, 2, 20, H, K), random(1, 2, 20, G, K), random(2, 2, 20, G, K)
        valid = np.arange(20) < np.array([[20], [13]])
        want = reference_attention(q, k, v, np.tril(np.ones((20, 20), bool)) & valid[:, None])
        np.testing.assert_allclose(sequence_attention(q, k, v, valid, 0, implementation), want, rtol=1e-5, atol=1e-5)


def test_implementation_is_selected_by_platform():
    assert select_implementation(None, "cpu") == "xla"
    assert select_implementation(None, "tpu") == "flash"
    assert select_implementation(None, "cuda") == ("flash" if jax.__version_info__ >= (0, 11, 1) else "xla")
    assert select_implementation("reference", "tpu") == "reference"


def test_invalid_implementation_is_rejected():
    with pytest.raises(
        ConfigError, match=r"^attention_implementation: expected one of reference, xla, flash, got 'x'$"
    ):
        select_implementation("x", "tpu")
    with pytest.raises(
        ConfigError, match=r'^attention_implementation: "flash" needs a TPU or a Hopper GPU; take "xla" or leave'
    ):
        DbrxForCausalLM.from_pretrained(GOLDEN / "fused", attention_implementation="flash")


def test_model_uses_the_requested_implementation(models, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 50, (1, 20))
    want = models("fused")(ids)
    monkeypatch.setattr(attention, "SHORT_SEQUENCE", 4)
    monkeypatch.setattr(attention, "SEQUENCE_BLOCK", 8)
    calls = []
    blockwise = attention.blockwise_attention
    monkeypatch.setattr(attention, "blockwise_attention", lambda *a: calls.append(1) or blockwise(*a))
    for name, blocks in (("reference", False), ("xla", True)):
        model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", dtype="float32", attention_implementation=name)
        np.testing.assert_allclose(model(ids), want, rtol=1e-4, atol=1e-4)
        assert bool(calls) == blocks


@pytest.mark.slow
def test_reference_implementation_generates_the_same_tokens(models):
    ids = np.random.default_rng(0).integers(0, 50, (1, 20))
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", dtype="float32", attention_implementation="reference")
    out = model.generate(ids, max_new_tokens=4)
    np.testing.assert_array_equal(out, models("fused").generate(ids, max_new_tokens=4))


def test_query_heads_attend_to_their_kv_head():
    q, k = random(0, 1, 3, H, K), random(1, 1, 3, G, K)
    v = np.broadcast_to(np.arange(G, dtype=np.float32)[:, None], (1, 3, G, K))
    out = reference_attention(q, k, v, np.ones((1, 3, 3), bool))
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 0, 0, 1, 1, 1], rtol=1e-6)


def test_fully_masked_row_is_finite():
    q, k, v = random(0, 1, 2, H, K), random(1, 1, 2, G, K), random(2, 1, 2, G, K)
    assert np.isfinite(reference_attention(q, k, v, np.zeros((1, 2, 2), bool))).all()


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotate_matches_complex_rotation(theta):
    x = random(3, 2, 5, H, K)
    positions = np.array([[0, 1, 2, 3, 30000], [7, 8, 9, 10, 11]])
    z = x[..., : K // 2] + 1j * x[..., K // 2 :]
    angle = positions[:, :, None, None] * theta ** (-2.0 * np.arange(K // 2) / K)
    rotated = z * np.exp(1j * angle)
    want = np.concatenate([rotated.real, rotated.imag], axis=-1)
    # float32 angles of up to 30000 radians are good to 2e-3.
    np.testing.assert_allclose(rotate(x, positions, theta), want, atol=5e-3)
    np.testing.assert_allclose(rotate(x, positions, theta)[:, :3], want[:, :3], atol=1e-5)


def test_rotate_keeps_float32_angles_in_bfloat16():
    x, positions = random(3, 1, 1, H, K), np.array([[20000]])
    low = rotate(jnp.asarray(x, jnp.bfloat16), positions, 5e5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), rotate(x, positions, 5e5), atol=0.05)


def test_layer_norm_matches_formula():
    x, scale = random(4, 3, 7, 20) * 5 + 30, random(5, 20)
    y = np.float64(x)
    want = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layer_norm(x, scale), want, rtol=1e-4, atol=1e-4)
    low = layer_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
