"""Tests of the TPU decode kernel for experts, interpreted on the CPU, against a sum over experts in float32."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.tpu.decode_experts import (
    DecodeTiles,
    decode_bytes,
    decode_experts,
    decode_grid,
    decode_operands,
    default_tiles,
    supports,
    tile_candidates,
    vmem_bytes,
)
from dbrx_jax.kernels.tpu.packed_weights import WeightFormat
from dbrx_jax.ops.experts import ACTIVATIONS
from tests.kernels.weights import FAST_COMPILE, shape_of, stored_bytes, to_float32, weight_of

pytestmark = pytest.mark.slow  # .ci/run also runs it with the newest JAX

FORMATS = ("plain", "int8", "fp8", "int4", "int4-128", "int4-64", "int4-32")
BOUNDS = {jnp.bfloat16: 1e-2, jnp.float32: 1e-5}


decode = jax.jit(decode_experts, static_argnames=("activation", "tiles", "interpret"), compiler_options=FAST_COMPILE)


def weights(fmt, dtype=jnp.float32, experts=3, width=384, d=256):
    """Returns random w1, v1 and w2 (E, F, D)."""
    return [weight_of((experts, width, d), fmt, c, dtype, seed) for seed, c in enumerate((1, 1, 0))]


def shapes(fmt, experts, width, d):
    return [shape_of((experts, width, d), fmt, c) for c in (1, 1, 0)]


def random_rows(count, d=256, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, d)), dtype)


def reference(x, active, count, combine_weights, w1, v1, w2, activation):
    x, combine_weights = np.asarray(x.astype(jnp.float32)), np.asarray(combine_weights)
    y = np.zeros(x.shape, np.float32)
    for i in range(count):
        gate, up, down = (to_float32(w)[active[i]] for w in (w1, v1, w2))
        mask = combine_weights[i] != 0
        inner = np.asarray(ACTIVATIONS[activation](x[mask] @ gate.T)) * (x[mask] @ up.T)
        y[mask] += combine_weights[i][mask, None] * (inner @ down)
    return y


def assert_close(got, want, dtype):
    scale = max(np.abs(want).max(), 1e-30)
    assert np.abs(np.asarray(got).astype(np.float32) - want).max() / scale < BOUNDS[dtype]


def run(x, active, count, combine_weights, experts, activation="silu", tiles=None):
    active, count = jnp.asarray(active), jnp.int32(count)
    y = decode(x, active, count, combine_weights, *experts, activation=activation, tiles=tiles, interpret=True)
    assert y.shape == x.shape
    assert y.dtype == jnp.float32
    return y


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [*((f, jnp.float32) for f in FORMATS), *((f, jnp.bfloat16) for f in ("plain", "int8", "fp8", "int4-128"))],
)
def test_decode_experts_match_reference(fmt, dtype):
    experts, x = weights(fmt, dtype), random_rows(5, dtype=dtype)
    combine_weights = jnp.asarray([[0.5, 0, 0.25, 0, 1], [0, 0.75, 0.5, 0, 0], [9, 9, 9, 9, 9]], jnp.float32)
    assert supports(x, *experts)
    y = run(x, [2, 0, 7], 2, combine_weights, experts, tiles=DecodeTiles(128))
    assert_close(y, reference(x, [2, 0], 2, combine_weights, *experts, "silu"), dtype)
    assert not np.asarray(y)[3].any()


@given(st.data())
@settings(max_examples=4)
def test_random_routing_matches_reference(data):
    fmt = data.draw(st.sampled_from(("plain", "int8", "int4-128")))
    num_experts = data.draw(st.integers(1, 4))
    experts = weights(fmt, jnp.float32, num_experts, 128 * data.draw(st.integers(1, 3)), 512)
    x = random_rows(data.draw(st.sampled_from((1, 7, 16, 33))), 512)
    active = data.draw(st.permutations(range(num_experts)))
    count = data.draw(st.integers(0, num_experts))
    combine_weights = np.random.default_rng(data.draw(st.integers(0, 99))).random((num_experts, len(x)))
    combine_weights = jnp.asarray(combine_weights * (combine_weights > 0.5), jnp.float32)
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    y = run(x, active, count, combine_weights, experts, activation)
    assert_close(y, reference(x, active, count, combine_weights, *experts, activation), jnp.float32)


@pytest.mark.parametrize("fmt", ["plain", "int8", "int4-64"])
def test_no_active_expert_gives_zeros(fmt):
    x = random_rows(3)
    y = run(x, [9, 9], 0, jnp.ones((2, 3)), weights(fmt))
    assert not np.asarray(y).any()


@pytest.mark.parametrize(("fmt", "value"), [("plain", np.inf), ("int8", np.nan), ("int4-128", np.inf)])
def test_non_finite_row_does_not_change_other_rows(fmt, value):
    experts, combine_weights = weights(fmt), jnp.asarray([[1, 0, 2], [1, 0, 0]], jnp.float32)
    x = random_rows(3)
    clean = run(x, [1, 2], 2, combine_weights, experts)
    y = np.asarray(run(x.at[1].set(value), [1, 2], 2, combine_weights, experts))
    np.testing.assert_array_equal(y, clean)
    y = np.asarray(run(x.at[0].set(value), [1, 2], 2, combine_weights, experts))
    assert not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[2], clean[2])


def fetched_bytes(specs, arrays, grid, scalars):
    """Returns the bytes of blocks whose index changes between steps of the grid, by their index maps."""
    steps = [jnp.asarray(i.reshape(-1), jnp.int32) for i in np.indices(grid)]
    total = 0
    for spec, array in zip(specs, arrays, strict=True):
        index = jax.vmap(lambda *step, spec=spec: spec.index_map(*step, *scalars))(*steps)
        index = np.stack([np.broadcast_to(i, steps[0].shape) for i in index], axis=1)
        changes = 1 + np.count_nonzero((index[1:] != index[:-1]).any(axis=1))
        shape = [1 if n is None else getattr(n, "block_size", n) for n in spec.block_shape]
        total += changes * math.prod(shape) * array.dtype.itemsize
    return total


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("count", "capacity"), [(0, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("tile", [128, 384])
def test_decode_bytes_match_the_grid(fmt, count, capacity, tile):
    experts, x, tiles = weights(fmt, jnp.bfloat16), random_rows(32, dtype=jnp.bfloat16), DecodeTiles(tile)
    active, combine_weights = jnp.asarray([2, 0, 1][:capacity]), jnp.ones((capacity, 32))
    operands = decode_operands(x, combine_weights, *experts, tiles)
    grid = decode_grid(operands, jnp.asarray([count]), tiles, WeightFormat.of(experts[0]))
    specs = [*grid.in_specs, grid.out_specs]
    arrays = [*(o for o in operands if o is not None), jnp.zeros(x.shape, jnp.float32)]
    size = fetched_bytes(specs, arrays, tuple(map(int, grid.grid)), (active, jnp.asarray([count])))
    assert decode_bytes(x, experts[0], capacity, count, tiles) == size


@pytest.mark.parametrize("fmt", ["int8", "int4-128"])
def test_active_expert_weights_are_read_once(fmt):
    """One more active expert of 16 adds the bytes of its weights."""
    x, experts = random_rows(16, 512, jnp.bfloat16), shapes(fmt, 16, 384, 512)
    expert_bytes = sum(w.nbytes for w in experts) // 16
    assert decode_bytes(x, experts[0], 16, 5) - decode_bytes(x, experts[0], 16, 4) == expert_bytes


@pytest.mark.parametrize("fmt", ["plain", "int8", "int4-128"])
@pytest.mark.parametrize("experts", [16, 2, 1])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_all_active_experts_are_read_once_at_published_sizes(fmt, experts, count):
    """Uses the published sizes, as the byte counts of compiled programs do."""
    weights, x = shapes(fmt, experts, 10752, 6144), random_rows(count, 6144, jnp.bfloat16)
    rows = -(-count // 16) * 16
    other_bytes = rows * 6144 * (2 + 4) + rows * experts * 4  # activations, results and combine weights
    read = decode_bytes(x, weights[0], experts, experts) - other_bytes
    assert read == pytest.approx(sum(map(stored_bytes, weights)), rel=0.015)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("width", [10752, 5376, 2688, 1344])
def test_published_sizes_have_tiles_within_vmem(fmt, width):
    """Up to 256 rows of 6144, 128 with groups, which exclude the narrowest F: it is not a multiple of the lanes."""
    grouped = fmt.startswith("int4-")
    width = max(width, 2688) if grouped else width
    w = shapes(fmt, 1, width, 6144)
    for count in (1, 64, 128 if grouped else 256):
        x = jax.ShapeDtypeStruct((count, 6144), jnp.bfloat16)
        assert supports(x, *w)
        tiles = default_tiles(x, w[0])
        assert tiles in tile_candidates(x, w[0])
        assert width % tiles.rows == 0
        assert vmem_bytes(x, w[0], tiles) <= 48 << 20


def test_supports_rejects_unsupported_operands():
    x, (w1, v1, w2) = random_rows(4), weights("int4-128")
    assert supports(x, w1, v1, w2)
    assert not supports(random_rows(257), w1, v1, w2)
    assert not supports(x.astype(jnp.float16), w1, v1, w2)
    assert not supports(x, w1, v1, weights("int8")[2])
    assert not supports(random_rows(4, 128), *weights("int4", d=128))
    assert not supports(random_rows(4, 192), *weights("plain", d=192))
    assert not supports(x, *(dataclasses.replace(w, group=48) for w in (w1, v1, w2)))
    assert not supports(x, *weights("plain", width=100))
