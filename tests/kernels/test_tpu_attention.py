"""Tests of the TPU attention kernels, interpreted on the CPU, against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.attention import cached_attention
from dbrx_jax.kernels.tpu import cache_attention as tpu_cache_attention
from dbrx_jax.kernels.tpu import sequence_attention as tpu_sequence_attention
from dbrx_jax.model.cache import quantize_to_int8
from dbrx_jax.ops.attention import reference_attention

pytestmark = pytest.mark.slow  # .ci/run also runs it with the newest JAX

H, G, K = 6, 2, 128  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_cache(seed, rows, positions, dtype, heads=G):
    """Returns random keys and values, and the scales of an int8 cache or None."""
    k, v = (jnp.asarray(random(seed + i, rows, heads, positions, K)) for i in (1, 2))
    if dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize_to_int8(k), quantize_to_int8(v)
        return k, v, (k_scale, v_scale)
    return k.astype(dtype), v.astype(dtype), None


def kernel(query, key, value, starts, first_row, context_shard, scales):
    with pltpu.force_tpu_interpret_mode():
        run = jax.jit(
            functools.partial(tpu_cache_attention.cache_attention, context_shard=context_shard, scales=scales)
        )
        return run(query, key, value, jnp.asarray(starts), first_row)


def assert_same_parts(got, want, tolerance):
    """Asserts equal maximum scores and sums, and zeros where a query attends to no position."""
    (largest, total, out), (true_largest, true_total, true_out) = ([np.asarray(x) for x in p] for p in (got, want))
    np.testing.assert_allclose(largest, true_largest, atol=tolerance * max(1, np.abs(true_out).max()))
    np.testing.assert_array_equal(total == 0, true_total == 0)
    rescale = np.exp(largest - true_largest)  # the maxima are rounded differently
    for x, true in ((total * rescale, true_total), (out * rescale[..., None], true_out)):
        assert np.abs(x - true).max() <= tolerance * np.abs(true).max()


def check(dtype, cache_dtype, starts, tokens, capacity, context_shard, first_row=1, seed=0, heads=G):
    query = jnp.asarray(random(seed, len(starts), tokens, H // G * heads, K), dtype)
    key, value, scales = random_cache(seed, len(starts) + 2, capacity, cache_dtype, heads)
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    want = cached_attention(
        query, key, value, positions, first_row, 0, context_shard, scales=scales, implementation="reference"
    )
    got = kernel(query, key, value, starts, first_row, context_shard, scales)
    assert_same_parts(got, want, 1e-5 if dtype == cache_dtype == "float32" else 1e-2)


@settings(max_examples=5)
@given(st.sampled_from(["float32", "bfloat16", "int8"]), st.integers(1, 4), st.integers(0, 99), st.data())
def test_decode_attention_matches_reference(cache_dtype, stride, seed, data):
    positions = data.draw(st.sampled_from([128, 384]))
    offset = data.draw(st.integers(0, stride - 1))
    # The first and last position, and random ones; some precede every position of their context_shard.
    ends = st.sampled_from([0, positions * stride - 1]) | st.integers(0, positions * stride - 1)
    starts = data.draw(st.lists(ends, min_size=1, max_size=3))
    dtype = "float32" if cache_dtype == "float32" else "bfloat16"
    check(dtype, cache_dtype, starts, 1, positions, (offset, stride), data.draw(st.integers(0, 2)), seed)


@settings(max_examples=3)
@given(st.sampled_from(["float32", "bfloat16", "int8"]), st.integers(1, 3), st.integers(0, 99), st.data())
def test_chunk_attention_matches_reference(cache_dtype, stride, seed, data):
    tokens = data.draw(st.sampled_from([128, 256]))
    start = data.draw(st.integers(0, 640 * stride - tokens))
    dtype = "float32" if cache_dtype == "float32" else "bfloat16"
    check(dtype, cache_dtype, [start], tokens, 640, (data.draw(st.integers(0, stride - 1)), stride), seed=seed)


@pytest.mark.parametrize(("cache_dtype", "heads"), [("bfloat16", 1), ("int8", 4)])
def test_cache_attention_supports_both_memory_layouts(cache_dtype, heads):
    """The heads are outside the positions where they are few, and inside otherwise."""
    check("bfloat16", cache_dtype, [130], 1, 256, (0, 1), heads=heads)


def test_row_bits_do_not_depend_on_other_rows_or_cache_length():
    query, (key, value, _) = jnp.asarray(random(0, 2, 1, H, K)), random_cache(0, 2, 1024, "float32")
    long = kernel(query, key, value, [100, 1023], 0, (0, 1), None)
    short = kernel(query[:1], key[:, :, :512], value[:, :, :512], [100], 0, (0, 1), None)
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_infinite_row_does_not_change_other_rows():
    query, (key, value, _) = jnp.asarray(random(0, 2, 1, H, K)), random_cache(0, 2, 128, "float32")
    clean = kernel(query, key, value, [100, 90], 0, (0, 1), None)
    dirty = kernel(query.at[1].set(jnp.inf), key.at[1].set(jnp.inf), value, [100, 90], 0, (0, 1), None)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_large_scores_do_not_overflow():
    query, (key, value, _) = jnp.asarray(random(0, 1, 1, H, K)) * 1e4, random_cache(0, 1, 128, "float32")
    _, total, out = kernel(query, key, value, [127], 0, (0, 1), None)
    want = reference_attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2), np.ones((1, 1, 128), bool))
    np.testing.assert_allclose(out / total[..., None], want, rtol=1e-4, atol=1e-4)


def fetched_bytes(spec, grid, prefetched, dtype):
    """Returns the bytes of blocks whose index changes between steps of the grid."""
    indices = [tuple(int(n) for n in spec.index_map(*step, *prefetched)) for step in np.ndindex(*grid)]
    changes = 1 + sum(a != b for a, b in itertools.pairwise(indices))
    return changes * int(np.prod(spec.block_shape)) * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("starts", "tokens", "context_shard", "dtype"),
    [
        ([5, 1000, 300], 1, (0, 1), "bfloat16"),
        ([7, 2000], 1, (3, 4), "int8"),
        ([384], 256, (0, 1), "bfloat16"),
        ([640], 256, (1, 3), "int8"),
    ],
)
def test_hbm_bytes_match_the_grid(monkeypatch, starts, tokens, context_shard, dtype):
    query = jnp.zeros((len(starts), tokens, H, K), jnp.bfloat16)
    key, value, scales = random_cache(0, len(starts), 1024, dtype)
    bytes_ = []

    def pallas_call(kernel, grid_spec, out_shape, **_):
        def run(*operands):
            grid = [int(n) for n in grid_spec.grid]
            for specs, arrays in ((grid_spec.in_specs, operands[2:]), (grid_spec.out_specs, out_shape)):
                pairs = zip(specs, arrays, strict=True)
                bytes_.append(sum(fetched_bytes(spec, grid, operands[:2], a.dtype) for spec, a in pairs))
            return [jnp.zeros(shape.shape, shape.dtype) for shape in out_shape]

        return run

    monkeypatch.setattr(tpu_cache_attention.pl, "pallas_call", pallas_call)
    monkeypatch.setattr(tpu_cache_attention, "in_hbm", lambda x: x)  # it works only in compiled programs
    tpu_cache_attention.cache_attention(query, key, value, jnp.asarray(starts), 0, context_shard, scales)
    assert tpu_cache_attention.hbm_bytes(query, key, np.array(starts), context_shard) == tuple(bytes_)


@pytest.mark.parametrize("changed", [{"K": 64}, {"positions": 100}, {"tokens": 100}, {"cache": "float32"}])
def test_supports_rejects_unsupported_shapes(changed):
    sizes = {"K": K, "positions": 256, "tokens": 128, "cache": "bfloat16"} | changed
    query = jax.ShapeDtypeStruct((1, sizes["tokens"], H, sizes["K"]), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, G, sizes["positions"], sizes["K"]), sizes["cache"])
    assert not tpu_cache_attention.supports(query, key, key)


def test_supports_accepts_supported_shapes():
    key = jax.ShapeDtypeStruct((1, G, 256, K), jnp.int8)
    for tokens in (1, 128):
        assert tpu_cache_attention.supports(jax.ShapeDtypeStruct((1, tokens, H, K), jnp.bfloat16), key, key)


def test_sequence_attention_and_gradients_match_reference(monkeypatch):
    """Left and right padding, a length that is not a multiple of the block, and queries of one device of three."""
    monkeypatch.setattr(tpu_sequence_attention, "BLOCK", 128)
    for tokens, length, first, left, right in ((200, 200, 0, 3, 7), (128, 384, 256, 140, 5)):
        query, grad = (jnp.asarray(random(i, 1, tokens, H, K)) for i in (0, 3))
        key, value = (jnp.asarray(random(i, 1, length, G, K)) for i in (1, 2))
        valid = (np.arange(length) >= left) & (np.arange(length) < length - right)
        mask = (np.arange(length) <= first + np.arange(tokens)[:, None])[None] & valid
        is_active = mask.any(axis=-1)[..., None, None]

        def kernel(q, k, v, valid=valid, first=first, is_active=is_active):
            out = tpu_sequence_attention.sequence_attention(q, k, v, valid[None], jnp.int32(first), interpret=True)
            return jnp.where(is_active, out, 0)

        def reference(q, k, v, mask=mask, is_active=is_active):
            return jnp.where(is_active, reference_attention(q, k, v, mask), 0)

        results = []
        for function in (kernel, reference):
            out, vjp = jax.vjp(jax.jit(function), query, key, value)
            results.append([np.asarray(x) for x in (out, *vjp(grad))])
        for got, want in zip(*results, strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
