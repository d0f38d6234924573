"""Tests of the GPU kernel of residual, norm, router and top-k, interpreted on the CPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.kernels.gpu.fixed_point import to_fixed_point
from dbrx_jax.kernels.gpu.integer_weights import pack, split_activations
from dbrx_jax.kernels.gpu.norm_route import norm_route, supports
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.routing import route
from tests.kernels.gpu import INTERPRET, fresh_interpreter  # noqa: F401, a fixture
from tests.kernels.weights import weight_of


def random_case(seed, D, num_experts, dtype=jnp.float32):
    """Returns x and y with rows of padding, whose NaNs must change nothing, the norm's scale and the router."""
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(4, D)) for _ in range(2))
    x[1:] = y[1:] = np.nan
    norm_scale = rng.uniform(0.1, 2, size=D)
    router = rng.normal(0, D**-0.5, size=(num_experts, D))
    return tuple(jnp.asarray(a, dtype) for a in (x, y, norm_scale, router))


def reference(x, y, norm_scale, router, top_k, norm):
    """Returns the sum, the normalised sum, and the routing of the first row."""
    total = (x + y)[:1]
    normed = layer_norm(total, norm_scale)
    return total, normed, route(jnp.matmul(normed, router.T, preferred_element_type=x.dtype), top_k, norm)


@functools.partial(jax.jit, static_argnames=("num_local", "top_k", "norm"))
def kernel(arrays, valid, first_expert, num_local, top_k, norm):
    total, normed, _, chosen = norm_route(*arrays, valid, first_expert, num_local, top_k, norm, None, INTERPRET)
    return total, normed, chosen


@pytest.mark.parametrize(
    ("D", "num_experts", "top_k", "norm"), [(128, 1, 1, None), (384, 5, 2, 1), (1024, 16, 4, 1), (256, 6, 6, None)]
)
def test_matches_reference(D, num_experts, top_k, norm):
    for seed in range(3):
        arrays = random_case(seed, D, num_experts)
        total, normed, chosen = kernel(arrays, True, 0, num_experts, top_k, norm)
        want, want_normed, routing = reference(*arrays, top_k, norm)
        np.testing.assert_allclose(total, want, atol=1e-6)
        np.testing.assert_allclose(normed, want_normed, atol=1e-5)
        np.testing.assert_array_equal(chosen.active, routing.experts[0])
        assert int(chosen.num_active) == top_k
        np.testing.assert_allclose(chosen.combine_weights[:, 0], routing.weights[0], rtol=1e-5)


def test_published_sizes_in_bfloat16():
    arrays = random_case(0, 6144, 16, jnp.bfloat16)
    assert supports(arrays[0], arrays[-1], 1)
    total, normed, chosen = kernel(arrays, True, 0, 16, 4, 1)
    want, want_normed, routing = reference(*arrays, 4, 1)
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (total, want)))
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (normed, want_normed)), atol=0.04)
    np.testing.assert_array_equal(np.sort(chosen.active), np.sort(routing.experts[0]))
    np.testing.assert_allclose(chosen.combine_weights.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("ties", [[3, 3, 3, 3, 3, 3], [0, 2, 1, 2, 2, 0], [-300, -400, 0, -500, -600, -700]])
def test_equal_probabilities_go_to_the_lower_expert(ties):
    """In the last case the probabilities of all experts but one are 0."""
    x, y, norm_scale, _ = random_case(0, 128, 6)
    normed = layer_norm((x + y)[:1], norm_scale)[0]
    router = jnp.outer(jnp.asarray(ties, jnp.float32), normed / (normed @ normed))
    _, _, chosen = kernel((x, y, norm_scale, router), True, 0, 6, 3, None)
    want = jax.lax.top_k(jax.nn.softmax(jnp.asarray(ties, jnp.float32)), 3)[1]
    np.testing.assert_array_equal(chosen.active, want)


@pytest.mark.parametrize(("first_expert", "num_local"), [(0, 4), (4, 4), (6, 2), (0, 8), (3, 1)])
def test_experts_of_a_device_come_first(first_expert, num_local):
    arrays = random_case(3, 256, 8)
    _, _, chosen = kernel(arrays, True, first_expert, num_local, 4, 1)
    _, _, routing = reference(*arrays, 4, 1)
    local = np.asarray(routing.experts[0]) - first_expert
    is_local = (local >= 0) & (local < num_local)
    count = is_local.sum()
    assert int(chosen.num_active) == count
    slots = min(4, num_local)
    np.testing.assert_array_equal(chosen.active, np.append(local[is_local], np.zeros(slots - count)))
    weights = np.asarray(routing.weights[0])[is_local]
    np.testing.assert_allclose(chosen.combine_weights[:, 0], np.append(weights, np.zeros(slots - count)), rtol=1e-5)


def test_normed_row_is_rounded_to_fixed_point():
    weight = pack(weight_of((2, 64, 512), "int4-64", 1), 1)
    arrays = random_case(1, 512, 4, jnp.bfloat16)
    _, normed, fixed, _ = jax.jit(lambda *a: norm_route(*a, jnp.bool_(True), 0, 4, 2, 1, weight, INTERPRET))(*arrays)
    expected = to_fixed_point(normed)
    np.testing.assert_allclose(fixed.largest[0, 0], expected.largest[0])
    np.testing.assert_array_equal(fixed.digits[0, :, :2], split_activations(expected.digits, weight))


def test_padding_goes_to_no_expert():
    _, _, chosen = kernel(random_case(0, 128, 8), False, 0, 8, 4, 1)
    assert int(chosen.num_active) == 0
    assert not np.any(chosen.combine_weights)
    assert not np.any(chosen.active)


@pytest.mark.parametrize(
    ("D", "num_experts", "norm", "dtype"),
    [(6144, 64, 1, "bfloat16"), (100, 16, 1, "bfloat16"), (128, 16, 2, "bfloat16"), (128, 16, 1, "float32")],
)
def test_supports_rejects_unsupported_sizes(D, num_experts, norm, dtype):
    assert not supports(jax.ShapeDtypeStruct((4, D), dtype), jax.ShapeDtypeStruct((num_experts, D), dtype), norm)
