"""Tests of expert kernels, called as by the model, against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax import backend
from dbrx_jax.kernels import dispatch
from dbrx_jax.kernels.experts import apply_experts
from dbrx_jax.kernels.stacked_experts import active_experts
from dbrx_jax.ops.experts import ExpertWeights, reference_experts

E, F, D, K = 4, 256, 128, 2
BACKENDS = ["tpu", "gpu"] if jax.__version_info__ >= backend.MIN_JAX_FOR_GPU_KERNELS else ["tpu"]


@pytest.fixture(params=BACKENDS)
def kernels(request, monkeypatch):
    """Makes the CPU use the kernels of a TPU or GPU."""
    monkeypatch.setitem(backend.KERNEL_BACKENDS, "cpu", request.param)
    return dispatch.expert_kernels("cpu")


def random_case(tokens):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    noise = rng.gumbel(size=(tokens, E)) - 3 * (np.arange(E) == 1)  # few tokens select expert 1, and none expert 2
    noise[:, 2] = -np.inf
    experts = np.argsort(-noise, axis=1)[:, :K].astype(np.int32)
    weights = rng.uniform(0.05, 1, size=(tokens, K)).astype(np.float32)
    return x, weights, experts, ExpertWeights(*(jnp.asarray(rng.normal(0, 0.1, (E, F, D)), jnp.float32) for _ in "wvw"))


@pytest.mark.parametrize("tokens", [5, 300])
def test_kernel_values_and_gradients_match_reference(kernels, tokens):
    x, weights, experts, expert_weights = random_case(tokens)
    valid = np.arange(tokens) % 7 != 3
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    assert kernels.supports_gradients(x, *expert_weights)

    def by_kernels(x, weights, expert_weights):
        y = apply_experts(x, weights, experts, expert_weights, "silu", valid)
        return jnp.sum(y * dy), y

    def by_reference(x, weights, expert_weights):
        y = reference_experts(x, weights, experts, expert_weights, "silu") * valid[:, None]
        return jnp.sum(y * dy), y

    actual, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(x, weights, expert_weights)
        for f in (by_kernels, by_reference)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    assert not np.any(actual[1][2].w1[2])  # no token selected this expert


def test_active_experts_are_distinct_with_combine_weights():
    experts = np.array([[3, 0], [0, 4], [4, 4]])  # 4 is an expert of another device
    weights = np.array([[0.5, 0.25], [0.125, 1.0], [1.0, 1.0]], np.float32)
    active, count, combine_weights = active_experts(weights, experts, 4)
    assert int(count) == 2
    assert sorted(np.asarray(active[:2]).tolist()) == [0, 3]
    by_expert = dict(zip(np.asarray(active).tolist(), np.asarray(combine_weights).tolist(), strict=True))
    assert by_expert[0] == [0.25, 0.125, 0.0]
    assert by_expert[3] == [0.5, 0.0, 0.0]
    assert not np.any(np.asarray(combine_weights)[2:])
