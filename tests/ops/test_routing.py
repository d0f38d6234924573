"""Tests of routing and the load-balancing loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.ops.routing import load_balancing_loss, route


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("norm", [None, 1.0, 2.0, 3.5])
def test_route_matches_softmax_top_k(norm):
    logits = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    probs, weights, experts = route(logits, 3, norm)
    np.testing.assert_allclose(probs, softmax(logits), rtol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :3]
    np.testing.assert_array_equal(experts, order)
    want = np.take_along_axis(softmax(logits), order, axis=1)
    if norm is not None:
        want = want / (want**norm).sum(-1, keepdims=True) ** (1 / norm)
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_route_breaks_ties_by_lower_expert():
    _, _, experts = route(np.array([[1.0, 2.0, 2.0, 1.0, 2.0]], np.float32), 4, 1.0)
    np.testing.assert_array_equal(experts, [[1, 2, 4, 0]])


def test_route_returns_float32_for_bfloat16_logits():
    probs, weights, _ = route(jnp.ones((2, 4), jnp.bfloat16), 2, 1.0)
    assert probs.dtype == weights.dtype == jnp.float32


def test_load_balancing_loss_is_one_when_even_and_num_experts_when_collapsed():
    even = np.zeros((4, 4), np.float32)  # probabilities even; each token's choice is set below
    routing = route(even, 1, 1.0)
    spread = routing._replace(experts=np.arange(4)[:, None])
    np.testing.assert_allclose(load_balancing_loss([spread, spread]), 1.0, rtol=1e-6)
    collapsed = route(np.array([[30.0, 0, 0, 0]] * 4, np.float32), 1, 1.0)
    np.testing.assert_allclose(load_balancing_loss([collapsed]), 4.0, rtol=1e-5)


def test_load_balancing_loss_ignores_padding():
    logits = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    valid = np.arange(20) < 12
    padded, unpadded = route(logits, 2, 1.0), route(logits[:12], 2, 1.0)
    for pooled in (False, True):
        np.testing.assert_allclose(
            load_balancing_loss([padded], valid, pooled), load_balancing_loss([unpadded], pooled=pooled), rtol=1e-6
        )
    assert not np.isclose(load_balancing_loss([padded]), load_balancing_loss([unpadded]))
