"""The TPU's kernel for a few tokens, interpreted on the CPU, against the plain sum over experts in float32."""

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
from tests.kernels.weights import QUICKLY, floats, shape_of, stored_bytes, weight_of

pytestmark = pytest.mark.slow  # the lane of the newest JAX runs it too

FORMS = ("plain", "int8", "fp8", "int4", "int4-128", "int4-64", "int4-32")
BOUNDS = {jnp.bfloat16: 1e-2, jnp.float32: 1e-5}


decode = jax.jit(decode_experts, static_argnames=("activation", "tiles", "interpret"), compiler_options=QUICKLY)


def weights(form, dtype=jnp.float32, experts=3, width=384, d=256):
    """w1, v1 and w2 (E, F, D)."""
    return [weight_of((experts, width, d), form, c, dtype, seed) for seed, c in enumerate((1, 1, 0))]


def shapes(form, experts, width, d):
    return [shape_of((experts, width, d), form, c) for c in (1, 1, 0)]


def rows_of(count, d=256, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, d)), dtype)


def reference(x, chosen, count, combine_weights, w1, v1, w2, activation):
    x, combine_weights = np.asarray(x.astype(jnp.float32)), np.asarray(combine_weights)
    y = np.zeros(x.shape, np.float32)
    for c in range(count):
        gate, up, down = (floats(w)[chosen[c]] for w in (w1, v1, w2))
        own = combine_weights[c] != 0
        inner = np.asarray(ACTIVATIONS[activation](x[own] @ gate.T)) * (x[own] @ up.T)
        y[own] += combine_weights[c][own, None] * (inner @ down)
    return y


def assert_close(got, want, dtype):
    scale = max(np.abs(want).max(), 1e-30)
    assert np.abs(np.asarray(got).astype(np.float32) - want).max() / scale < BOUNDS[dtype]


def run(x, chosen, count, combine_weights, experts, activation="silu", tiles=None):
    chosen, count = jnp.asarray(chosen), jnp.int32(count)
    y = decode(x, chosen, count, combine_weights, *experts, activation=activation, tiles=tiles, interpret=True)
    assert y.shape == x.shape
    assert y.dtype == jnp.float32
    return y


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((f, jnp.float32) for f in FORMS), *((f, jnp.bfloat16) for f in ("plain", "int8", "fp8", "int4-128"))],
)
def test_the_sum_over_chosen_experts(form, dtype):
    experts, x = weights(form, dtype), rows_of(5, dtype=dtype)
    combine_weights = jnp.asarray([[0.5, 0, 0.25, 0, 1], [0, 0.75, 0.5, 0, 0], [9, 9, 9, 9, 9]], jnp.float32)
    assert supports(x, *experts)
    y = run(x, [2, 0, 7], 2, combine_weights, experts, tiles=DecodeTiles(128))
    assert_close(y, reference(x, [2, 0], 2, combine_weights, *experts, "silu"), dtype)
    assert not np.asarray(y)[3].any()


@given(st.data())
@settings(max_examples=4)
def test_any_routing(data):
    form = data.draw(st.sampled_from(("plain", "int8", "int4-128")))
    count_of = data.draw(st.integers(1, 4))
    experts = weights(form, jnp.float32, count_of, 128 * data.draw(st.integers(1, 3)), 512)
    x = rows_of(data.draw(st.sampled_from((1, 7, 16, 33))), 512)
    chosen = data.draw(st.permutations(range(count_of)))
    count = data.draw(st.integers(0, count_of))
    combine_weights = np.random.default_rng(data.draw(st.integers(0, 99))).random((count_of, len(x)))
    combine_weights = jnp.asarray(combine_weights * (combine_weights > 0.5), jnp.float32)
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    y = run(x, chosen, count, combine_weights, experts, activation)
    assert_close(y, reference(x, chosen, count, combine_weights, *experts, activation), jnp.float32)


@pytest.mark.parametrize("form", ["plain", "int8", "int4-64"])
def test_no_expert_gives_zeros(form):
    x = rows_of(3)
    y = run(x, [9, 9], 0, jnp.ones((2, 3)), weights(form))
    assert not np.asarray(y).any()


@pytest.mark.parametrize(("form", "value"), [("plain", np.inf), ("int8", np.nan), ("int4-128", np.inf)])
def test_a_row_that_is_no_number_stays_alone(form, value):
    experts, combine_weights = weights(form), jnp.asarray([[1, 0, 2], [1, 0, 0]], jnp.float32)
    x = rows_of(3)
    clean = run(x, [1, 2], 2, combine_weights, experts)
    y = np.asarray(run(x.at[1].set(value), [1, 2], 2, combine_weights, experts))
    np.testing.assert_array_equal(y, clean)
    y = np.asarray(run(x.at[0].set(value), [1, 2], 2, combine_weights, experts))
    assert not np.isfinite(y[0]).any()
    np.testing.assert_array_equal(y[2], clean[2])


def moved(specs, arrays, grid, scalars):
    """Bytes of blocks that change from one step to the next, for the grid's blocks as their index maps say."""
    steps = [jnp.asarray(i.reshape(-1), jnp.int32) for i in np.indices(grid)]
    total = 0
    for spec, array in zip(specs, arrays, strict=True):
        index = jax.vmap(lambda *step, spec=spec: spec.index_map(*step, *scalars))(*steps)
        index = np.stack([np.broadcast_to(i, steps[0].shape) for i in index], axis=1)
        changes = 1 + np.count_nonzero((index[1:] != index[:-1]).any(axis=1))
        shape = [1 if n is None else getattr(n, "block_size", n) for n in spec.block_shape]
        total += changes * math.prod(shape) * array.dtype.itemsize
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "places"), [(0, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("tile", [128, 384])
def test_bytes_are_those_of_the_grid(form, count, places, tile):
    experts, x, tiles = weights(form, jnp.bfloat16), rows_of(32, dtype=jnp.bfloat16), DecodeTiles(tile)
    chosen, combine_weights = jnp.asarray([2, 0, 1][:places]), jnp.ones((places, 32))
    operands = decode_operands(x, combine_weights, *experts, tiles)
    grid = decode_grid(operands, jnp.asarray([count]), tiles, WeightFormat.of(experts[0]))
    specs = [*grid.in_specs, grid.out_specs]
    arrays = [*(o for o in operands if o is not None), jnp.zeros(x.shape, jnp.float32)]
    size = moved(specs, arrays, tuple(map(int, grid.grid)), (chosen, jnp.asarray([count])))
    assert decode_bytes(x, experts[0], places, count, tiles) == size


@pytest.mark.parametrize("form", ["int8", "int4-128"])
def test_each_chosen_weight_is_read_once(form):
    """Copies the bytes of the active experts among 16, and little more."""
    x, experts = rows_of(16, 512, jnp.bfloat16), shapes(form, 16, 384, 512)
    one = sum(w.nbytes for w in experts) // 16
    assert decode_bytes(x, experts[0], 16, 5) - decode_bytes(x, experts[0], 16, 4) == one


@pytest.mark.parametrize("form", ["plain", "int8", "int4-128"])
@pytest.mark.parametrize("experts", [16, 2, 1])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_with_all_experts_a_call_reads_its_operands_once(form, experts, count):
    """At published sizes, as the count of a whole program's bytes takes it."""
    weights, x = shapes(form, experts, 10752, 6144), rows_of(count, 6144, jnp.bfloat16)
    rows = -(-count // 16) * 16
    beside = rows * 6144 * (2 + 4) + rows * experts * 4  # activations and results, and what each expert counts
    read = decode_bytes(x, weights[0], experts, experts) - beside
    assert read == pytest.approx(sum(map(stored_bytes, weights)), rel=0.015)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [10752, 5376, 2688, 1344])
def test_published_sizes_have_tiles(form, width):
    """Up to 256 rows of 6144; with small groups fewer, and not the narrowest F, which lanes do not divide."""
    grouped = form.startswith("int4-")
    width = max(width, 2688) if grouped else width
    w = shapes(form, 1, width, 6144)
    for count in (1, 64, 128 if grouped else 256):
        x = jax.ShapeDtypeStruct((count, 6144), jnp.bfloat16)
        assert supports(x, *w)
        chosen = default_tiles(x, w[0])
        assert chosen in tile_candidates(x, w[0])
        assert width % chosen.rows == 0
        assert vmem_bytes(x, w[0], chosen) <= 48 << 20


def test_what_is_not_taken():
    x, (w1, v1, w2) = rows_of(4), weights("int4-128")
    assert supports(x, w1, v1, w2)
    assert not supports(rows_of(257), w1, v1, w2)
    assert not supports(x.astype(jnp.float16), w1, v1, w2)
    assert not supports(x, w1, v1, weights("int8")[2])
    assert not supports(rows_of(4, 128), *weights("int4", d=128))
    assert not supports(rows_of(4, 192), *weights("plain", d=192))
    assert not supports(x, *(dataclasses.replace(w, group=48) for w in (w1, v1, w2)))
    assert not supports(x, *weights("plain", width=100))
