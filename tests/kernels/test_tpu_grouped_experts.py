"""Tests of the TPU kernel for experts of large batches, interpreted on the CPU, against float32 matmuls."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.tpu import grouped_experts as module
from dbrx_jax.kernels.tpu.grouped_experts import (
    BLOCK_TILES,
    ROW_TILE,
    BlockSizes,
    block_sizes,
    grouped_bytes,
    grouped_experts,
    grouped_grid,
    grouped_operands,
    num_row_tiles,
    permuted_columns,
    row_blocks,
    supports,
    vmem_bytes,
)
from dbrx_jax.kernels.tpu.packed_weights import WeightFormat
from dbrx_jax.ops.experts import ACTIVATIONS
from tests.kernels.test_tpu_decode_experts import FORMATS, assert_close, fetched_bytes, random_rows, shapes, weights
from tests.kernels.weights import FAST_COMPILE, stored_bytes, to_float32

pytestmark = pytest.mark.slow  # .ci/run also runs it with the newest JAX

SIZES = ([70, 0, 300, 129], [0, 0, 0], [0, 1000], [128, 0, 256], [1, 2, 0, 3])


@partial(jax.jit, static_argnames=("activation", "num_parts"), compiler_options=FAST_COMPILE)
def run(rows, sizes, experts, activation="silu", num_parts=1):
    assert supports(rows, *experts)
    parts = jnp.split(permuted_columns(rows, experts[0]), num_parts, axis=1)
    return jnp.concatenate(grouped_experts(parts, sizes, *experts, activation=activation, interpret=True), axis=1)


def check(sizes, fmt, dtype=jnp.float32, width=384, d=256, activation="silu", num_parts=1):
    """Compares every expert's rows; the others are NaN, in the input too."""
    experts = weights(fmt, dtype, len(sizes), width, d)
    tiles = [-(-n // ROW_TILE) for n in sizes]
    starts = ROW_TILE * (np.cumsum(tiles) - tiles)
    in_group = [slice(start, start + n) for start, n in zip(starts, sizes, strict=True)]
    rows = np.full(((sum(tiles) + 1) * ROW_TILE, d), np.nan, np.float32)
    for group in in_group:
        rows[group] = random_rows(group.stop - group.start, d, seed=int(group.start))
    rows = jnp.asarray(rows, dtype)
    y = run(rows, jnp.asarray(sizes), experts, activation, num_parts)
    assert y.dtype == dtype
    want = np.zeros(y.shape, np.float32)
    for e, group in enumerate(in_group):
        gate, up, down = (to_float32(w)[e] for w in experts)
        x = np.asarray(rows[group].astype(jnp.float32))
        want[group] = (np.asarray(ACTIVATIONS[activation](x @ gate.T)) * (x @ up.T)) @ down
    is_used = np.zeros(len(want), bool)
    for group in in_group:
        is_used[group] = True
    if is_used.any():
        assert_close(np.asarray(y)[is_used], want[is_used], dtype)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [*((f, jnp.float32) for f in FORMATS), *((f, jnp.bfloat16) for f in ("plain", "int8", "fp8", "int4-128"))],
)
def test_grouped_experts_match_reference(fmt, dtype):
    check(SIZES[0], fmt, dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_empty_and_uneven_experts_match_reference(sizes):
    check(sizes, "int8")


@pytest.mark.parametrize("fmt", ["plain", "int4-64"])
def test_wide_experts_and_other_activations_match_reference(fmt):
    """Two tiles of F, two chunks of D, and rows in two parts."""
    check([200, 40], fmt, width=512, d=2048, activation="gelu", num_parts=2)


def test_expert_with_many_blocks_matches_reference(monkeypatch):
    """A block has fewer rows than the expert, so its weights are read again."""
    monkeypatch.setattr(module, "BLOCK_TILES", (2, 1))
    run.clear_cache()
    check([300, 700], "plain")
    run.clear_cache()


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.sampled_from(["plain", "int8", "int4-128"]))
@settings(max_examples=3)
def test_random_groups_match_reference(sizes, fmt):
    check(sizes, fmt)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=16), st.sampled_from(BLOCK_TILES), st.integers(0, 300))
@settings(max_examples=30)
def test_blocks_hold_every_row_tile_once(sizes, block_tiles, unused_rows):
    num_tiles = num_row_tiles(sum(sizes) + unused_rows, len(sizes))
    tiles = [-(-n // ROW_TILE) for n in sizes]
    assert sum(tiles) <= num_tiles
    blocks = jax.jit(row_blocks, static_argnums=(1, 2))(jnp.asarray(sizes), num_tiles, block_tiles)
    want = [(e, t) for e, n in enumerate(tiles) for t in range(n)]
    expert, first, count = (np.asarray(a)[: int(blocks.number)] for a in blocks[:3])
    got = [(e, f + i) for e, f, n in zip(expert, first, count, strict=True) for i in range(n)]
    assert got == [(e, n) for n, (e, _) in enumerate(want)]
    assert len(expert) == max(sum(-(-n // block_tiles) for n in tiles), 1)
    assert count.max() <= block_tiles
    for e in set(expert) if want else ():  # an expert's blocks are of about equal size
        assert np.ptp(count[expert == e]) <= 1


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("sizes", [[300, 0, 57], [0, 0, 0], [0, 1000, 0], [3, 0, 0]], ids=str)
def test_grouped_bytes_match_the_grid(sizes, fmt):
    """A block copies the rows of its tiles in and out, in the kernel; the grid copies the weights."""
    experts = weights(fmt, jnp.bfloat16)
    rows = random_rows(num_row_tiles(1000, 3) * ROW_TILE, dtype=jnp.bfloat16)
    block = block_sizes(rows, experts[0])
    weights_and_scales = grouped_operands(*experts, block)
    blocks = jax.jit(row_blocks, static_argnums=(1, 2))(jnp.asarray(sizes), len(rows) // ROW_TILE, block.tiles)
    grid = grouped_grid([rows], *weights_and_scales, blocks, block, WeightFormat.of(experts[0]))
    specs, arrays = jax.tree.leaves(grid.in_specs[1:]), jax.tree.leaves(weights_and_scales)
    size = fetched_bytes(specs, arrays, tuple(map(int, grid.grid)), blocks[:3])
    size += 2 * int(blocks.num_tiles.sum()) * ROW_TILE * rows.shape[1] * 2
    # Scales of the down projection are read once for consecutive blocks of an expert.
    assert size == pytest.approx(grouped_bytes(rows, experts[0], sizes), rel=0.02)


@pytest.mark.parametrize("fmt", FORMATS)
def test_published_sizes_have_large_blocks_within_vmem(fmt):
    """A chunk of 2048 tokens has 512 rows an expert on average: their weights are read once."""
    for experts, width in ((16, 10752), (2, 10752), (1, 2688)):
        w1, v1, w2 = shapes(fmt, experts, width, 6144)
        x = jax.ShapeDtypeStruct((2048, 6144), jnp.bfloat16)
        assert supports(x, w1, v1, w2)
        block = block_sizes(x, w1)
        assert vmem_bytes(x, w1, block) <= 48 << 20
        if fmt not in ("int4-32", "int4-64"):  # with few weights to a scale, scales take MiBs
            assert block == BlockSizes(6, 256 if width % 256 == 0 else 128)
        row_bytes = 2 * 512 * experts * 6144 * 2
        want = sum(map(stored_bytes, (w1, v1, w2))) + row_bytes
        assert grouped_bytes(x, w1, [512] * experts) == pytest.approx(want, rel=0.001)  # w2 has other scales


def test_supports_rejects_unsupported_operands():
    rows, experts = random_rows(300), weights("int8")
    assert supports(rows, *experts)
    assert not supports(random_rows(300, 128), *weights("int4", d=128))
    assert not supports(rows.astype(jnp.float16), *experts)
    assert not supports(rows, *weights("int8", width=320))
    assert not supports(rows, experts[0], experts[1], weights("plain")[2])
    assert not supports(rows.astype(jnp.bfloat16), *weights("plain", jnp.float32))
    unknown = [dataclasses.replace(w, kind="nvfp4") for w in experts]
    assert not supports(rows, *unknown)  # a format without a kernel
