"""Tests of the native experts for CPUs against the reference, by instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.kernels import experts as module
from dbrx_jax.kernels.cpu.experts import apply_experts, supports
from dbrx_jax.kernels.cpu.library import instruction_sets
from dbrx_jax.ops.experts import ACTIVATIONS, ExpertWeights, reference_experts
from tests.kernels.test_cpu_matmul import exact, random_rows, random_weight

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native kernels were not built")
E, F, D, K = 5, 70, 52, 3


def random_experts(fmt, dtype="float32", scale=0.3):
    def weights(contracted, seed):
        drawn = (random_weight(fmt, (F, D), contracted, dtype, seed + 7 * e) for e in range(E))
        return tuple(drawn)

    return ExpertWeights(weights(1, 0), weights(1, 1), weights(0, 2))


def random_routing(tokens, seed=3):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    return jnp.asarray(rng.random((tokens, K)), jnp.float32), jnp.asarray(experts)


def reference(x, weights, experts, expert_weights, activation):
    plain = ExpertWeights(*(tuple(jnp.asarray(exact(w), jnp.float32) for w in ws) for ws in expert_weights))
    return np.asarray(reference_experts(x.astype(jnp.float32), weights, experts, plain, activation))


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("fmt", ["plain", "int8", "int4", "int4-32", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_match_reference(instruction_set, fmt, dtype):
    expert_weights = random_experts(dtype if fmt == "plain" else fmt, dtype)
    for tokens in (1, 7, 50):
        x, routing = 0.3 * random_rows(tokens, D, dtype), random_routing(tokens)
        y = apply_experts(x, *routing, expert_weights, "silu", instruction_set)
        assert y.dtype == x.dtype
        want = reference(x, *routing, expert_weights, "silu")
        limit = 5e-6 if dtype == "float32" else 1e-2
        assert np.abs(np.float32(y) - want).max() <= limit * np.abs(want).max(), tokens


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_match_reference_at_any_size(instruction_set, activation):
    """Rows of 1e-3 to 1e3 times the size take gates into the exponential's limits."""
    expert_weights = random_experts("float32")
    for size in (1e-3, 1.0, 30.0, 1e3):
        x, routing = size * random_rows(6, D), random_routing(6)
        y = np.asarray(apply_experts(x, *routing, expert_weights, activation, instruction_set))
        want = reference(x, *routing, expert_weights, activation)
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max(), size


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_uneven_routing_and_experts_of_other_devices(instruction_set):
    """All tokens have one expert in common; some experts are elsewhere, and one token has none here."""
    tokens = 90
    expert_weights, x = random_experts("float32"), random_rows(tokens, D)
    weights, _ = random_routing(tokens)
    experts = jnp.stack([jnp.full(tokens, 2), jnp.arange(tokens) % 2 * 4, jnp.full(tokens, E)], axis=1)
    experts = experts.at[5].set(jnp.asarray([E, -1, E + 3]))
    y = np.asarray(apply_experts(x, weights, experts, expert_weights, "silu", instruction_set))
    is_local = (experts >= 0) & (experts < E)
    clipped, local_weights = jnp.where(is_local, experts, 0), jnp.where(is_local, weights, 0)
    want = reference(x, local_weights, clipped, expert_weights, "silu")
    np.testing.assert_allclose(y, want, rtol=0, atol=5e-6 * np.abs(want).max())
    assert not y[5].any()


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_tokens_do_not_depend_on_each_other(instruction_set):
    expert_weights, x = random_experts("int8", "bfloat16"), random_rows(45, D, "bfloat16")
    weights, experts = random_routing(45)

    def run(rows, x=x):
        return np.asarray(apply_experts(x[rows], weights[rows], experts[rows], expert_weights, "silu", instruction_set))

    y = run(slice(0, 45))
    for rows in (slice(0, 1), slice(3, 20), slice(44, 45)):
        np.testing.assert_array_equal(run(rows), y[rows])
    bad = run(slice(0, 45), x.at[7].set(jnp.nan))
    assert np.isnan(np.float32(bad[7])).all()
    np.testing.assert_array_equal(np.delete(bad, 7, 0), np.delete(y, 7, 0))


def test_dispatch_takes_the_kernels_and_differentiates():
    x, (weights, experts), expert_weights = 0.1 * random_rows(4, D), random_routing(4), random_experts("float32")
    assert supports(x, expert_weights)
    run = jax.jit(lambda x, ws: module.apply_experts(x, weights, experts, ws, "silu"))
    assert 'custom_call_target="dbrx_experts"' in run.lower(x, expert_weights).compile().as_text()
    dx = jax.grad(lambda x: jnp.sum(run(x, expert_weights) ** 2))(x)
    want = jax.grad(lambda x: jnp.sum(reference_experts(x, weights, experts, expert_weights, "silu") ** 2))(x)
    assert np.abs(dx - want).max() <= 1e-4 * np.abs(want).max()
    stacked = ExpertWeights(*(jnp.stack(ws) for ws in expert_weights))
    assert not supports(x, stacked)
