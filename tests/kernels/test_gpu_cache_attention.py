"""Tests of the GPU cache attention kernel, interpreted on the CPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from dbrx_jax.kernels.gpu import cache_attention as gpu_cache_attention
from dbrx_jax.model.cache import CACHE_BLOCK, LayerCache, quantize_to_int8, write_cache
from dbrx_jax.ops.attention import reference_attention, reference_cached_attention
from tests.kernels.paged import paged

H, G, K = 6, 2, 128  # query heads, key-value heads, elements


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def few_warp_groups(monkeypatch):
    """Reduces the number of warp groups, because interpreting a full GPU takes long."""
    monkeypatch.setattr(gpu_cache_attention, "WARP_GROUPS", 6)
    monkeypatch.setattr(gpu_cache_attention, "WARP_GROUPS_FOR_ONE_ROW", 6)


def random_cache(seed, rows, positions, dtype):
    """Returns pools of random keys and values in shuffled blocks, the table, and the scales of an int8 cache or None.

    Blocks that belong to no row, block 0 among them, have NaNs.
    """
    k, v = (jnp.asarray(random(seed + i, rows, G, positions, K)) for i in (1, 2))
    if dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize_to_int8(k), quantize_to_int8(v)
        (k, v, *scales), table = paged([k, v, k_scale, v_scale], CACHE_BLOCK, seed)
        return k, v, table, tuple(scales)
    (k, v), table = paged([k.astype(dtype), v.astype(dtype)], CACHE_BLOCK, seed)
    return k, v, table, None


def kernel(query, key, value, starts, table, context_shard=(0, 1), scales=None):
    interpret = plgpu.InterpretGPUParams()
    run = functools.partial(
        gpu_cache_attention.cache_attention, context_shard=context_shard, scales=scales, interpret=interpret
    )
    return jax.jit(run)(query, key, value, jnp.asarray(starts), jnp.asarray(table))


def assert_same_parts(got, want, tolerance=1e-2):
    """Asserts equal maximum scores and sums, and zeros where a query attends to no position."""
    (largest, total, out), (true_largest, true_total, true_out) = ([np.asarray(x) for x in p] for p in (got, want))
    np.testing.assert_allclose(largest, true_largest, atol=tolerance * max(1, np.abs(true_out).max()))
    np.testing.assert_array_equal(total == 0, true_total == 0)
    rescale = np.exp(largest - true_largest)  # the maxima are rounded differently
    for x, true in ((total * rescale, true_total), (out * rescale[..., None], true_out)):
        assert np.abs(x - true).max() <= tolerance * np.abs(true).max()


def check(cache_dtype, starts, tokens, capacity, context_shard, seed, heads=H, shared=0):
    """Compares the kernel with the reference; all rows have the first row's first `shared` blocks."""
    query = jnp.asarray(random(seed, len(starts), tokens, heads, K), jnp.bfloat16)
    key, value, table, scales = random_cache(seed, len(starts), capacity, cache_dtype)
    table[:, :shared] = table[0, :shared]
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    want = reference_cached_attention(query, key, value, positions, table, context_shard, scales)
    assert_same_parts(kernel(query, key, value, starts, table, context_shard, scales), want)


@settings(max_examples=5)
@given(st.sampled_from(["bfloat16", "int8"]), st.integers(1, 4), st.integers(0, 99), st.data())
def test_decode_attention_matches_reference(cache_dtype, stride, seed, data):
    positions = data.draw(st.sampled_from([128, 384]))
    offset = data.draw(st.integers(0, stride - 1))
    # The first and last position, and random ones; some precede every position of their context_shard.
    ends = st.sampled_from([0, positions * stride - 1]) | st.integers(0, positions * stride - 1)
    starts = data.draw(st.lists(ends, min_size=1, max_size=3))
    check(cache_dtype, starts, 1, positions, (offset, stride), seed)


@pytest.mark.parametrize(
    ("cache_dtype", "context_shard"), [("bfloat16", (0, 1)), ("int8", (0, 1)), ("bfloat16", (1, 2)), ("int8", (0, 2))]
)
def test_eight_rows_of_very_different_lengths_share_a_prefix(cache_dtype, context_shard):
    starts = np.array([700, 300, 258, 320, 639, 257, 384, 511]) * context_shard[1]
    check(cache_dtype, starts, 1, 768, context_shard, 5, shared=2)


def test_chunk_attention_with_equal_query_and_key_heads():
    check("bfloat16", [64], 64, 256, (0, 1), 3, heads=G)


@settings(max_examples=2)
@given(st.sampled_from(["bfloat16", "int8"]), st.integers(1, 3), st.integers(0, 99), st.data())
def test_chunk_attention_matches_reference(cache_dtype, stride, seed, data):
    tokens = data.draw(st.sampled_from([64, 128]))
    start = data.draw(st.integers(0, 384 * stride - tokens))
    check(cache_dtype, [start], tokens, 384, (data.draw(st.integers(0, stride - 1)), stride), seed)


@pytest.mark.parametrize(
    ("cache_dtype", "context_shard"), [("bfloat16", (0, 1)), ("int8", (0, 1)), ("bfloat16", (1, 2)), ("int8", (0, 2))]
)
def test_chunks_of_three_rows_begin_at_different_blocks(cache_dtype, context_shard):
    starts = np.array([128, 0, 384]) * context_shard[1]
    check(cache_dtype, starts, 64, 512, context_shard, 7)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("tokens", "stride"), [(1, 1), (1, 2), (64, 1), (64, 2)])
def test_positions_that_no_query_sees_do_not_change_bits(cache_dtype, tokens, stride):
    """They have NaNs, also within a row's last block, and table entries behind that are 0."""
    starts, shard = np.array([100, 320]) * stride, (stride - 1, stride)
    query = jnp.asarray(random(0, 2, tokens, H, K), jnp.bfloat16)
    key, value, table, scales = random_cache(0, 2, 512, cache_dtype)
    clean = kernel(query, key, value, starts, table, shard, scales)
    floats = [np.array(x) for x in scales or (key, value)]
    for row, start in enumerate(starts):
        live = (start + tokens - 1 - shard[0]) // stride + 1
        last, behind = divmod(live, CACHE_BLOCK)
        for array in floats:
            array[table[row, last], :, behind:] = np.nan
            array[table[row, last + 1 :]] = np.nan
        table[row, last + (behind > 0) :] = 0
    dirty = [jnp.asarray(x) for x in floats]
    pools, scales = ((key, value), tuple(dirty)) if scales else (dirty, None)
    for a, b in zip(clean, kernel(query, *pools, starts, table, shard, scales), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("starts", "is_valid", "heads"),
    [([0], [1], H), ([127], [1], 5 * G), ([128, 63, 320], [1, 1, 1], 7 * G), ([383, 64, 200], [1, 0, 1], G)],
)
def test_new_keys_and_values_are_written_and_attended_to(starts, is_valid, heads):
    """Positions behind the new one have NaNs, as have blocks of no row; padding changes nothing."""
    R = len(starts)
    query, new_key, new_value = (jnp.asarray(random(i, R, 1, n, K), jnp.bfloat16) for i, n in enumerate((heads, G, G)))
    key, value, table, _ = random_cache(4, R, 384, "bfloat16")
    key, value = np.array(key), np.array(value)
    for row, start in enumerate(starts):
        block, behind = divmod(start, CACHE_BLOCK)
        for pool in (key, value):
            pool[table[row, block], :, behind:] = np.nan
            pool[table[row, block + 1 :]] = np.nan
    pools, valid, positions = [jnp.asarray(p) for p in (key, value)], np.array(is_valid, bool), np.array(starts)
    arguments = query, new_key, new_value, *pools, positions, valid, table
    run = functools.partial(gpu_cache_attention.write_and_attend, interpret=plgpu.InterpretGPUParams())
    part, *written = jax.jit(run)(*arguments)
    want = write_cache(LayerCache(*pools), new_key, new_value, valid[:, None], positions[:, None], table)
    for pool, true in zip(written, (want.key, want.value), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint16) for x in (pool, true)))
    true = reference_cached_attention(query, *map(jnp.nan_to_num, want[:2]), positions[:, None], table, (0, 1), None)
    assert_same_parts([x[valid] for x in part], [x[valid] for x in true])


def test_row_bits_do_not_depend_on_other_rows_or_the_table():
    """The same row is elsewhere in the pools, and its table is shorter."""
    query, (k, v) = jnp.asarray(random(0, 2, 1, H, K), jnp.bfloat16), (random(i, 2, G, 512, K) for i in (1, 2))
    (key, value), table = paged([jnp.asarray(x, jnp.bfloat16) for x in (k, v)], CACHE_BLOCK, 1)
    long = kernel(query, key, value, [100, 500], table)
    (key, value), table = paged([jnp.asarray(x[:, :, :128], jnp.bfloat16) for x in (k, v)], CACHE_BLOCK, 2)
    short = kernel(query, key, value, [100, 3], table)
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_padding_behind_the_table_does_not_change_a_chunk():
    query = jnp.asarray(random(0, 1, 256, H, K), jnp.bfloat16)
    key, value, table, _ = random_cache(0, 1, 256, "bfloat16")
    whole = kernel(query, key, value, [0], table)
    for a, b in zip(whole, kernel(query, key, value, [0], table[:, :1]), strict=True):
        np.testing.assert_array_equal(a[:, :128], b[:, :128])


@pytest.mark.filterwarnings("ignore:invalid value")  # from NumPy, in the interpreter
def test_infinite_row_does_not_change_other_rows():
    query = jnp.asarray(random(0, 2, 1, H, K), jnp.bfloat16)
    key, value, table, _ = random_cache(0, 2, 128, "bfloat16")
    clean = kernel(query, key, value, [100, 90], table)
    dirty = kernel(query.at[1].set(jnp.inf), key.at[table[1]].set(jnp.inf), value, [100, 90], table)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_large_scores_do_not_overflow():
    query = jnp.asarray(random(0, 1, 1, H, K), jnp.bfloat16) * 1000
    key, value, table, _ = random_cache(0, 1, 128, "bfloat16")
    _, total, out = kernel(query, key, value, [127], table)
    q, k, v = (x.astype(jnp.float32) for x in (query, *(pool[table[:, 0]].swapaxes(1, 2) for pool in (key, value))))
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
    key, value, table, scales = random_cache(0, len(starts), 384, dtype)
    jax.block_until_ready(kernel(query, key, value, starts, table, context_shard, scales))
    jax.effects_barrier()
    assert gpu_cache_attention.hbm_bytes(query, key, np.array(starts), context_shard) == (copied["in"], copied["out"])


@pytest.mark.parametrize("changed", [{"K": 64}, {"block": 96}, {"tokens": 100}, {"cache": "float32"}])
def test_supports_rejects_unsupported_shapes(changed):
    sizes = {"K": K, "block": 128, "tokens": 128, "cache": "bfloat16"} | changed
    query = jax.ShapeDtypeStruct((1, sizes["tokens"], H, sizes["K"]), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((5, G, sizes["block"], sizes["K"]), sizes["cache"])
    assert not gpu_cache_attention.supports(query, key, key)


def test_supports_accepts_supported_shapes():
    for dtype in (jnp.bfloat16, jnp.int8):
        key = jax.ShapeDtypeStruct((5, G, CACHE_BLOCK, K), dtype)
        for tokens in (1, 128):
            assert gpu_cache_attention.supports(jax.ShapeDtypeStruct((1, tokens, H, K), jnp.bfloat16), key, key)
