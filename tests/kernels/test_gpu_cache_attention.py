"""Tests of the GPU cache attention kernel, interpreted on the CPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.attention import cached_attention
from dbrx_jax.kernels.gpu import cache_attention as gpu_cache_attention
from dbrx_jax.model.cache import quantize_to_int8
from dbrx_jax.ops.attention import reference_attention

H, G, K = 6, 2, 128  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def few_warp_groups(monkeypatch):
    """Reduces the number of warp groups, because interpreting a full GPU takes long."""
    monkeypatch.setattr(gpu_cache_attention, "WARP_GROUPS", 6)


def random_cache(seed, rows, positions, dtype):
    """Returns random keys and values, and the scales of an int8 cache or None."""
    k, v = (jnp.asarray(random(seed + i, rows, G, positions, K)) for i in (1, 2))
    if dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize_to_int8(k), quantize_to_int8(v)
        return k, v, (k_scale, v_scale)
    return k.astype(dtype), v.astype(dtype), None


def kernel(query, key, value, starts, first_row, context_shard, scales):
    interpret = plgpu.InterpretGPUParams()
    run = functools.partial(
        gpu_cache_attention.cache_attention, context_shard=context_shard, scales=scales, interpret=interpret
    )
    return jax.jit(run)(query, key, value, jnp.asarray(starts), first_row)


def assert_same_parts(got, want, tolerance=1e-2):
    """Asserts equal maximum scores and sums, and zeros where a query attends to no position."""
    (largest, total, out), (true_largest, true_total, true_out) = ([np.asarray(x) for x in p] for p in (got, want))
    np.testing.assert_allclose(largest, true_largest, atol=tolerance * max(1, np.abs(true_out).max()))
    np.testing.assert_array_equal(total == 0, true_total == 0)
    rescale = np.exp(largest - true_largest)  # the maxima are rounded differently
    for x, true in ((total * rescale, true_total), (out * rescale[..., None], true_out)):
        assert np.abs(x - true).max() <= tolerance * np.abs(true).max()


def check(cache_dtype, starts, tokens, capacity, context_shard, first_row, seed, heads=H):
    query = jnp.asarray(random(seed, len(starts), tokens, heads, K), jnp.bfloat16)
    key, value, scales = random_cache(seed, len(starts) + 2, capacity, cache_dtype)
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    want = cached_attention(
        query, key, value, positions, first_row, 0, context_shard, scales=scales, implementation="reference"
    )
    assert_same_parts(kernel(query, key, value, starts, first_row, context_shard, scales), want)


@settings(max_examples=4)
@given(st.sampled_from(["bfloat16", "int8"]), st.integers(1, 4), st.integers(0, 99), st.data())
def test_decode_attention_matches_reference(cache_dtype, stride, seed, data):
    positions = data.draw(st.sampled_from([64, 448]))
    offset = data.draw(st.integers(0, stride - 1))
    # The first and last position, and random ones; some precede every position of their context_shard.
    ends = st.sampled_from([0, positions * stride - 1]) | st.integers(0, positions * stride - 1)
    starts = data.draw(st.lists(ends, min_size=1, max_size=3))
    check(cache_dtype, starts, 1, positions, (offset, stride), data.draw(st.integers(0, 2)), seed)


def test_chunk_attention_with_equal_query_and_key_heads():
    check("bfloat16", [64], 64, 192, (0, 1), 0, 3, heads=G)


@settings(max_examples=2)
@given(st.sampled_from(["bfloat16", "int8"]), st.integers(1, 3), st.integers(0, 99), st.data())
def test_chunk_attention_matches_reference(cache_dtype, stride, seed, data):
    tokens = data.draw(st.sampled_from([64, 128]))
    start = data.draw(st.integers(0, 320 * stride - tokens))
    check(cache_dtype, [start], tokens, 320, (data.draw(st.integers(0, stride - 1)), stride), 1, seed)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_blocks_after_the_last_position_are_not_read(cache_dtype):
    query, (key, value, scales) = jnp.asarray(random(0, 1, 1, H, K), jnp.bfloat16), random_cache(0, 1, 512, cache_dtype)
    clean = kernel(query, key, value, [100], 0, (0, 1), scales)
    if scales:
        scales = tuple(x.at[:, :, 128:].set(jnp.nan) for x in scales)
    else:
        key, value = (x.at[:, :, 128:].set(jnp.nan) for x in (key, value))
    for a, b in zip(clean, kernel(query, key, value, [100], 0, (0, 1), scales), strict=True):
        np.testing.assert_array_equal(a, b)


def test_row_bits_do_not_depend_on_other_rows_or_cache_length():
    query, (key, value, _) = jnp.asarray(random(0, 2, 1, H, K), jnp.bfloat16), random_cache(0, 2, 512, "bfloat16")
    long = kernel(query, key, value, [100, 500], 0, (0, 1), None)
    short = kernel(query, key[:, :, :128], value[:, :, :128], [100, 3], 0, (0, 1), None)
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.filterwarnings("ignore:invalid value")  # from NumPy, in the interpreter
def test_infinite_row_does_not_change_other_rows():
    query, (key, value, _) = jnp.asarray(random(0, 2, 1, H, K), jnp.bfloat16), random_cache(0, 2, 128, "bfloat16")
    clean = kernel(query, key, value, [100, 90], 0, (0, 1), None)
    dirty = kernel(query.at[1].set(jnp.inf), key.at[1].set(jnp.inf), value, [100, 90], 0, (0, 1), None)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_large_scores_do_not_overflow():
    query, (key, value, _) = jnp.asarray(random(0, 1, 1, H, K), jnp.bfloat16), random_cache(0, 1, 128, "bfloat16")
    query = query * 1000
    _, total, out = kernel(query, key, value, [127], 0, (0, 1), None)
    q, k, v = (x.astype(jnp.float32) for x in (query, key.swapaxes(1, 2), value.swapaxes(1, 2)))
    want = reference_attention(q, k, v, np.ones((1, 1, 128), bool))
    assert np.abs(out / total[..., None] - want).max() <= 1e-2 * np.abs(want).max()


@pytest.mark.parametrize(
    ("starts", "tokens", "context_shard", "dtype"),
    [([5, 300], 1, (0, 1), "bfloat16"), ([1, 900], 1, (2, 3), "int8"), ([70], 128, (0, 1), "bfloat16")],
)
def test_hbm_bytes_match_the_copies(monkeypatch, starts, tokens, context_shard, dtype):
    copied = {"in": 0, "out": 0}

    def count_bytes(copy, direction, index):
        def run(*arguments):
            size = int(np.prod(arguments[index].shape)) * jnp.dtype(arguments[index].dtype).itemsize
            jax.debug.callback(lambda: copied.__setitem__(direction, copied[direction] + size))
            copy(*arguments)

        return run

    for name, direction, index in (("copy_gmem_to_smem", "in", 0), ("copy_smem_to_gmem", "out", 1)):
        monkeypatch.setattr(plgpu, name, count_bytes(getattr(plgpu, name), direction, index))
    query = jnp.asarray(random(0, len(starts), tokens, H, K), jnp.bfloat16)
    key, value, scales = random_cache(0, len(starts), 384, dtype)
    jax.block_until_ready(kernel(query, key, value, starts, 0, context_shard, scales))
    jax.effects_barrier()
    assert gpu_cache_attention.hbm_bytes(query, key, np.array(starts), context_shard) == (copied["in"], copied["out"])


@pytest.mark.parametrize("changed", [{"K": 64}, {"positions": 100}, {"tokens": 100}, {"cache": "float32"}])
def test_supports_rejects_unsupported_shapes(changed):
    sizes = {"K": K, "positions": 256, "tokens": 128, "cache": "bfloat16"} | changed
    query = jax.ShapeDtypeStruct((1, sizes["tokens"], H, sizes["K"]), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, G, sizes["positions"], sizes["K"]), sizes["cache"])
    assert not gpu_cache_attention.supports(query, key, key)


def test_supports_accepts_supported_shapes():
    for dtype in (jnp.bfloat16, jnp.int8):
        key = jax.ShapeDtypeStruct((1, G, 256, K), dtype)
        for tokens in (1, 128):
            assert gpu_cache_attention.supports(jax.ShapeDtypeStruct((1, tokens, H, K), jnp.bfloat16), key, key)
