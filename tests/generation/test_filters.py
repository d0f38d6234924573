"""Tests of the filters against transformers' definitions in NumPy, whole and with the vocabulary split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from dbrx_jax.generation.filters import Filters, Nucleus, filter_logits
from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, Partition, make_mesh

ROWS, V = 4, 64


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def remove(scores, is_removed):
    return np.where(is_removed, -np.inf, scores)


def top_k(scores, k):
    return remove(scores, scores < np.sort(scores)[:, -min(k, V), None])


def top_p(scores, p):
    """Keeps the most probable; of equal scores it removes the lower id first, as a stable sort does."""
    result = scores.copy()
    for row in result:
        order = np.argsort(row, kind="stable")
        removed = np.cumsum(softmax(row[order])) <= 1 - p
        removed[-1] = False
        row[order[removed]] = -np.inf
    return result


def min_p(scores, p):
    probs = softmax(scores)
    return remove(scores, probs < p * probs.max(-1, keepdims=True))


def log_softmax(scores):
    with np.errstate(divide="ignore"):
        return np.log(softmax(scores))


def entropy(logp):
    return -np.where(np.isfinite(logp), np.exp(logp) * np.where(np.isfinite(logp), logp, 0), 0).sum(-1, keepdims=True)


def typical_p(scores, mass):
    logp = log_softmax(scores)
    distance = np.abs(-logp - entropy(logp))
    order = np.argsort(distance, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(np.exp(logp), order, 1), axis=1)
    last = np.minimum((cumulative < mass).sum(1), V - 1)
    return remove(scores, distance > np.take_along_axis(distance, order, 1)[np.arange(len(scores)), last][:, None])


def epsilon_cutoff(scores, epsilon):
    return remove(scores, (softmax(scores) < epsilon) & (scores < scores.max(-1, keepdims=True)))


def eta_cutoff(scores, epsilon):
    eta = np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy(log_softmax(scores))))
    return remove(scores, (softmax(scores) < eta) & (scores < scores.max(-1, keepdims=True)))


OPTIONS = {
    "top_k": (top_k, st.integers(1, V)),
    "top_p": (top_p, st.floats(0.01, 0.995)),
    "min_p": (min_p, st.floats(0.001, 1)),
    "typical_p": (typical_p, st.floats(0.05, 0.99)),
    "epsilon_cutoff": (epsilon_cutoff, st.floats(0.001, 0.4)),
    "eta_cutoff": (eta_cutoff, st.floats(0.001, 0.4)),
}


def make_filters(options):
    value = {name: np.float32([value]) for name, value in options.items()}
    top_p, min_p = value.get("top_p", np.float32([1])), value.get("min_p", np.float32([0]))
    nucleus = Nucleus(np.array([options.get("top_k", V)]), top_p, min_p)
    return Filters(nucleus, value.get("typical_p"), value.get("epsilon_cutoff"), value.get("eta_cutoff"))


def kept_by_transformers(logits, options, scale):
    """Returns which tokens remain, with all limits but top-k multiplied by a number near 1.

    A limit stays a probability: by a min_p above 1 no token would remain.
    """
    scores = logits.astype(np.float64)
    for name, value in options.items():
        scores = OPTIONS[name][0](scores, value if name == "top_k" else min(value * scale, 1.0))
    return np.isfinite(scores)


@jax.jit
def filtered(logits, filters):
    return filter_logits(logits, filters, jnp.arange(ROWS), ONE_DEVICE)


@jax.jit
def filtered_on_mesh(logits, filters):
    partition = Partition(make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4]))
    spec = PartitionSpec(None, VOCAB_AXES)
    run = partition.shard_map(
        lambda x, f: filter_logits(x, f, jnp.arange(ROWS), partition), (spec, PartitionSpec()), spec
    )
    return run(logits, filters)


@settings(max_examples=25)
@given(st.integers(0, 9999), st.booleans(), st.sets(st.sampled_from(list(OPTIONS)), min_size=1, max_size=3), st.data())
def test_filters_match_transformers_and_a_split_vocabulary(seed, has_ties, names, data):
    logits = np.random.default_rng(seed).normal(0, 3, (ROWS, V)).astype(np.float32)
    logits = np.round(logits) if has_ties else logits
    options = {name: data.draw(OPTIONS[name][1]) for name in OPTIONS if name in names}
    # A probability may lie on a limit within rounding.
    wanted = [kept_by_transformers(logits, options, scale) for scale in (1, 1 + 1e-5, 1 - 1e-5)]
    for run in (filtered, filtered_on_mesh):
        got = np.asarray(run(logits, make_filters(options)))
        is_kept = np.isfinite(got)
        np.testing.assert_array_equal(got[is_kept], logits[is_kept])
        for row in range(ROWS):
            assert any((is_kept[row] == want[row]).all() for want in wanted)


def test_top_p_keeps_the_highest_ids_of_equal_logits():
    logits = np.zeros((1, V), np.float32)
    logits[0, :4] = 5
    kept = np.isfinite(np.asarray(filtered(logits, make_filters({"top_p": 0.5}))))[0]
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 2, 3])


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}, {"epsilon_cutoff": 0.99}])
def test_most_probable_token_always_stays(options):
    logits = np.random.default_rng(0).normal(0, 1, (ROWS, V)).astype(np.float32)
    kept = np.isfinite(np.asarray(filtered(logits, make_filters(options))))
    np.testing.assert_array_equal(kept, logits == logits.max(-1, keepdims=True))
