"""Tests of the TPU attention kernels, interpreted on the CPU, against the reference."""

import functools
import math

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
from dbrx_jax.model.cache import CACHE_BLOCK, quantize_to_int8
from dbrx_jax.ops.attention import reference_attention
from tests.kernels.paged import paged

pytestmark = pytest.mark.slow  # .ci/run also runs it with the newest JAX

H, G, K = 6, 2, 128  # query heads, key-value heads, elements
P = CACHE_BLOCK


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_cache(seed, rows, blocks, dtype, heads=G):
    """Returns random pools of keys and values, the scales of an int8 cache or None, and a table of `blocks` a row."""
    arrays = [jnp.asarray(random(seed + i, rows, heads, blocks * P, K)) for i in (1, 2)]
    if dtype == "int8":
        (key, key_scale), (value, value_scale) = map(quantize_to_int8, arrays)
        (key, value, *scales), table = paged((key, value, key_scale, value_scale), P, seed)
        return key, value, tuple(scales), table
    pools, table = paged([x.astype(dtype) for x in arrays], P, seed)
    return *pools, None, table


def kernel(query, key, value, starts, table, context_shard=(0, 1), scales=None):
    with pltpu.force_tpu_interpret_mode():
        run = jax.jit(functools.partial(tpu_cache_attention.cache_attention, context_shard=context_shard))
        return run(query, key, value, jnp.asarray(starts), jnp.asarray(table), scales=scales)


def assert_same_parts(got, want, tolerance):
    """Asserts equal maximum scores and sums, and zeros where a query attends to no position."""
    (largest, total, out), (true_largest, true_total, true_out) = ([np.asarray(x) for x in p] for p in (got, want))
    np.testing.assert_allclose(largest, true_largest, atol=tolerance * max(1, np.abs(true_out).max()))
    np.testing.assert_array_equal(total == 0, true_total == 0)
    rescale = np.exp(largest - true_largest)  # the maxima are rounded differently
    for x, true in ((total * rescale, true_total), (out * rescale[..., None], true_out)):
        assert np.abs(x - true).max() <= tolerance * np.abs(true).max()


def check(dtype, cache_dtype, starts, tokens, width, context_shard=(0, 1), seed=0, heads=G, share=lambda table: None):
    """Compares with the reference; `share` may change the table before."""
    query = jnp.asarray(random(seed, len(starts), tokens, H // G * heads, K), dtype)
    key, value, scales, table = random_cache(seed, len(starts), width, cache_dtype, heads)
    share(table)
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    want = cached_attention(
        query, key, value, positions, table, context_shard, scales=scales, implementation="reference"
    )
    got = kernel(query, key, value, starts, seen_table(table, positions, context_shard), context_shard, scales)
    assert_same_parts(got, want, 1e-5 if dtype == cache_dtype == "float32" else 1e-2)


def seen_table(table, positions, context_shard):
    """Returns the table with the spare block, which has NaN, where no query of the row sees the block."""
    first = np.arange(table.shape[1]) * P * context_shard[1] + context_shard[0]
    return np.where(first <= positions[:, -1:], table, 0)


def dtype_for(cache_dtype):
    return "float32" if cache_dtype == "float32" else "bfloat16"


@settings(max_examples=5)
@given(st.sampled_from(["float32", "bfloat16", "int8"]), st.sampled_from([1, 3, 8]), st.integers(0, 99), st.data())
def test_decode_attention_matches_reference(cache_dtype, rows, seed, data):
    width, stride = data.draw(st.sampled_from([1, 3, 6])), data.draw(st.integers(1, 4))
    offset = data.draw(st.integers(0, stride - 1))
    # The first and last position, and random ones; some precede every position of their context_shard.
    last = width * P * stride - 1
    starts = data.draw(st.lists(st.sampled_from([0, last]) | st.integers(0, last), min_size=rows, max_size=rows))
    check(dtype_for(cache_dtype), cache_dtype, starts, 1, width, (offset, stride), seed)


@settings(max_examples=3)
@given(st.sampled_from(["float32", "bfloat16", "int8"]), st.integers(1, 3), st.integers(0, 99), st.data())
def test_chunk_attention_matches_reference(cache_dtype, stride, seed, data):
    tokens, width = data.draw(st.sampled_from([32, 96, 256])), 5
    starts = data.draw(st.lists(st.integers(0, width * P * stride - tokens), min_size=1, max_size=2))
    context_shard = data.draw(st.integers(0, stride - 1)), stride
    check(dtype_for(cache_dtype), cache_dtype, starts, tokens, width, context_shard, seed)


def test_a_few_queries_of_a_row_attend_as_rows_of_their_own():
    """As in a step that verifies proposals; the second row's queries are in two blocks."""
    query = jnp.asarray(random(3, 2, 5, H, K))
    key, value, _, table = random_cache(4, 2, 3, "float32")
    positions = np.array([[7], [P - 2]]) + np.arange(5)
    want = cached_attention(query, key, value, positions, table, implementation="reference")
    with pltpu.force_tpu_interpret_mode():
        table = seen_table(table, positions, (0, 1))
        run = jax.jit(functools.partial(cached_attention, platform="tpu", implementation="flash"))
        got = run(query, key, value, positions, jnp.asarray(table))
    assert "pallas" in str(run.trace(query, key, value, positions, table).jaxpr)
    assert_same_parts(got, want, 1e-5)


def test_rows_of_very_different_lengths_match_reference():
    """The second of these devices' shards has no position that rows 0, 3 and 4 see."""
    for shard in (0, 1):
        check("bfloat16", "bfloat16", [0, 2 * 7 * P - 1, 700, 0, 0, 2 * P, 1, 1200], 1, 7, (shard, 2))


def test_blocks_that_a_tile_leaves_to_the_next_are_right():
    """The tiles of a chunk at the start see few blocks; those at 3 blocks pass the size of a group."""
    check("float32", "float32", [0, 3 * P], 512, 7)
    check("bfloat16", "int8", [0], 1024, 5, (1, 3))


def test_padding_may_be_past_the_table():
    """Queries from position 256 on see what the table has; a second row's blocks are next to it in memory."""
    check("float32", "float32", [0, 10], 384, 2)


@pytest.mark.parametrize("tokens", [1, 32])
def test_rows_can_share_blocks(tokens):
    def share(table):
        table[1:, :2] = table[0, :2]
        table[2, 2:4] = table[1, 2:4]

    check("float32", "float32", [500, 400, 470], tokens, 5, share=share)


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(("cache_dtype", "heads"), [("bfloat16", 1), ("bfloat16", 8), ("int8", 2), ("int8", 8)])
def test_cache_attention_supports_all_memory_layouts(cache_dtype, heads, tokens):
    """The heads are outside the positions where they are few, and inside otherwise."""
    check("bfloat16", cache_dtype, [130], tokens, 3, heads=heads)


@pytest.mark.parametrize(
    ("cache_dtype", "tokens", "heads"),
    [("bfloat16", 1, 1), ("bfloat16", 1, 2), ("bfloat16", 32, 2), ("int8", 1, 4), ("int8", 32, 4)],
)
def test_stale_positions_behind_the_last_do_not_change_a_row(cache_dtype, tokens, heads):
    """A block's former owner may have left NaN behind the last position of the row."""
    query = jnp.asarray(random(0, 1, tokens, H // G * heads, K), jnp.bfloat16)
    key, value, scales, table = random_cache(0, 1, 2, cache_dtype, heads)
    clean = kernel(query, key, value, [140], table, scales=scales)
    beyond = (table[0, 1], slice(None), slice(140 + tokens - P, None))
    if scales:
        key, value = (x.at[beyond].set(-127) for x in (key, value))
        scales = tuple(x.at[beyond].set(jnp.nan) for x in scales)
    else:
        key, value = (x.at[beyond].set(jnp.nan) for x in (key, value))
    for a, b in zip(clean, kernel(query, key, value, [140], table, scales=scales), strict=True):
        np.testing.assert_array_equal(a, b)


def test_row_bits_do_not_depend_on_other_rows_or_the_table():
    query = jnp.asarray(random(0, 2, 1, H, K))
    key, value, _, table = random_cache(0, 2, 8, "float32")
    long = kernel(query, key, value, [600, 1023], table)
    order = np.random.default_rng(1).permutation(key.shape[0])  # move all blocks
    moved = np.argsort(order)[table]
    short = kernel(query[:1], key[order], value[order], [600], moved[:1, :5])
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_infinite_row_does_not_change_other_rows():
    query = jnp.asarray(random(0, 3, 1, H, K))
    key, value, _, table = random_cache(0, 3, 1, "float32")
    clean = kernel(query, key, value, [100, 90, 80], table)
    key, value = (x.at[table[1, 0]].set(jnp.inf) for x in (key, value))
    dirty = kernel(query.at[1].set(jnp.inf), key, value, [100, 90, 80], table)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


def test_large_scores_do_not_overflow():
    query = jnp.asarray(random(0, 1, 1, H, K)) * 1e4
    key, value, _, table = random_cache(0, 1, 1, "float32")
    _, total, out = kernel(query, key, value, [P - 1], table)
    k, v = (x[table[0]].swapaxes(1, 2) for x in (key, value))
    want = reference_attention(query, k, v, np.ones((1, 1, P), bool))
    np.testing.assert_allclose(out / total[..., None], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("starts", "tokens", "context_shard", "dtype"),
    [
        ([5, 1000, 300], 1, (0, 1), "bfloat16"),
        ([2, 2000], 1, (3, 4), "int8"),  # the first row sees nothing of this shard
        ([0], 768, (0, 1), "bfloat16"),  # tiles see 1 to 6 blocks
        ([640, 100], 256, (1, 3), "int8"),
    ],
)
def test_hbm_bytes_match_the_copies(monkeypatch, starts, tokens, context_shard, dtype):
    query = jnp.asarray(random(0, len(starts), tokens, H, K), jnp.bfloat16)
    key, value, scales, table = random_cache(0, len(starts), 8, dtype)
    copied = []

    class Copy:
        def __init__(self, source, target, semaphore):
            self.copy = make_async_copy(source, target, semaphore)
            self.size = math.prod(source.shape) * source.dtype.itemsize
            self.wait = self.copy.wait

        def start(self):
            jax.debug.callback(lambda: copied.append(self.size))
            self.copy.start()

    make_async_copy = pltpu.make_async_copy
    monkeypatch.setattr(tpu_cache_attention.pltpu, "make_async_copy", Copy)
    out = kernel(query, key, value, starts, table, context_shard, scales)
    jax.block_until_ready(out)
    jax.effects_barrier()
    read, written = tpu_cache_attention.hbm_bytes(query, key, np.array(starts), context_shard)
    assert read == sum(copied) + query.nbytes  # each tile of queries is read, and each of results written, once
    # Of a single query the largest scores, and the sums, are each padded to a vector.
    stats = 2 * 4 * P * len(starts) if tokens == 1 else 2 * out[0].nbytes
    assert written == out[2].nbytes + stats


@pytest.mark.parametrize("changed", [{"K": 64}, {"block": 64}, {"tokens": 100}, {"cache": "float32"}, {"G": 3}])
def test_supports_rejects_unsupported_shapes(changed):
    sizes = {"K": K, "block": P, "tokens": 128, "cache": "bfloat16", "G": G} | changed
    query = jax.ShapeDtypeStruct((1, sizes["tokens"], H, sizes["K"]), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((9, sizes["G"], sizes["block"], sizes["K"]), sizes["cache"])
    assert not tpu_cache_attention.supports(query, key, key)


def test_supports_accepts_supported_shapes():
    key = jax.ShapeDtypeStruct((9, G, P, K), jnp.int8)
    for tokens in (1, 32, 128, 2048):
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
