"""Tests of the training loss against the oracle, of gradients, and of a training step."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.ops.experts import reference_experts
from dbrx_jax.ops.routing import load_balancing_loss
from dbrx_jax.training.step import losses, make_step
from tests.conftest import CASES
from tests.model.test_causal_lm import TINY


def evaluate(model, tokens, loss_mask):
    """Returns the losses, compiled as one program for speed."""
    graph, params = nnx.split(model)
    return jax.jit(lambda p: losses(nnx.merge(graph, p), tokens, loss_mask))(params)


@pytest.mark.parametrize("case", CASES)
def test_losses_match_the_oracle(case, models, expected):
    e = expected[case]
    tokens = e["tokens"][:1]
    # The oracle's auxiliary loss includes all tokens; ours only those with a target.
    result = evaluate(models(case), tokens, np.ones_like(tokens))
    np.testing.assert_allclose(result.cross_entropy, e["loss"], rtol=1e-5)
    graph, params = nnx.split(models(case))
    hidden = jax.jit(lambda p: nnx.merge(graph, p).hidden(tokens[:, :-1], np.ones((1, 19), bool), np.arange(19)[None]))
    _, routings = hidden(params)
    np.testing.assert_allclose(result.balance, load_balancing_loss(routings), rtol=1e-5)
    weight = models(case).config.moe_loss_weight
    np.testing.assert_allclose(result.total, result.cross_entropy + weight * result.balance, rtol=1e-6)


def test_masked_targets_do_not_change_the_loss(models, expected):
    tokens = expected["fused"]["tokens"][:2]
    mask = np.ones_like(tokens)
    mask[0, 5:] = 0
    mask[1] = 0
    unmasked = evaluate(models("fused"), tokens[:1, :5], np.ones((1, 5)))
    np.testing.assert_allclose(evaluate(models("fused"), tokens, mask).cross_entropy, unmasked.cross_entropy, rtol=1e-5)


@pytest.mark.slow
def test_gradients_match_reference_experts(monkeypatch):
    graph, params = nnx.split(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 101, (2, 41))

    def gradient():
        def loss(params):
            return losses(nnx.merge(graph, params), tokens, np.ones(tokens.shape)).total

        return nnx.to_flat_state(jax.jit(jax.grad(loss))(params))

    ours = gradient()
    plain = lambda x, w, e, weights, act, *_: reference_experts(x, w, e, weights, act)  # noqa: E731
    monkeypatch.setattr("dbrx_jax.model.moe.apply_experts", plain)
    for (path, a), (_, b) in zip(ours, gradient(), strict=True):
        a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert np.linalg.norm(b) > 0, path
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), path


def test_training_reduces_loss_and_keeps_experts_balanced():
    model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    optimizer = optax.adam(3e-3)
    state, step = optimizer.init(params), make_step(graph, optimizer)
    rng = np.random.default_rng(0)
    first = None
    for _ in range(60):  # consecutive token ids, so that each token determines the next
        tokens = (rng.integers(0, 101, (4, 1)) + np.arange(25)) % 101
        params, state, result, norm = step(params, state, tokens, np.ones(tokens.shape, np.float32))
        first = first or float(result.cross_entropy)
    assert first > 4
    assert float(result.cross_entropy) < 0.5 * first
    assert 1 <= float(result.balance) < 1.6
    assert np.isfinite(norm)
