"""Tests of sampling: samples against their distribution, the greedy choice, and random keys."""

import jax
import jax.numpy as jnp
import numpy as np

from dbrx_jax.generation.filters import Filters, Nucleus
from dbrx_jax.generation.sampling import Sampling, argmax, row_keys, sample_tokens, scale_and_filter

V = 23


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@jax.jit
def sample_rows(logits, sampling):
    scores = scale_and_filter(logits[None], sampling, jnp.array([0]))
    return jax.vmap(lambda key: sample_tokens(scores, key[None], np.array([7]))[0])(sampling.keys)


def sample_many(logits, temperature, filters, count):
    """Samples `count` tokens for one row."""
    keys = row_keys(np.arange(count, dtype=np.uint32), None)
    return np.asarray(sample_rows(logits, Sampling(keys, np.array([temperature], np.float32), filters)))


def test_samples_follow_the_distribution():
    logits = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
    tokens = sample_many(logits, 1.3, Filters(), 20000)
    frequency = np.bincount(tokens, minlength=V) / len(tokens)
    probs = softmax(logits / 1.3)
    assert (np.abs(frequency - probs) < 5 * np.sqrt(probs * (1 - probs) / len(tokens)) + 1e-4).all()


def test_samples_follow_the_filtered_distribution():
    """Temperature applies before the filters."""
    logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
    tokens = sample_many(logits, 0.8, Filters(Nucleus(np.array([9]), np.float32([0.8]), np.float32([0.05]))), 20000)
    scores = logits / 0.8
    order = np.argsort(-scores)[:9]
    probs = softmax(scores[order])
    order = order[np.cumsum(probs) - probs < 0.8]
    order = order[softmax(scores[order]) >= 0.05 * softmax(scores[order])[0]]
    assert 3 < len(order) < 9
    frequency = np.bincount(tokens, minlength=V) / len(tokens)
    want = np.zeros(V)
    want[order] = softmax(scores[order])
    assert (np.abs(frequency - want) < 5 * np.sqrt(want * (1 - want) / len(tokens)) + 1e-9).all()


def test_greedy_selects_the_lowest_id_of_equal_logits():
    logits = np.zeros((2, V), np.float32)
    logits[1, [4, 9]] = 3
    np.testing.assert_array_equal(argmax(logits), [0, 4])


def test_sample_depends_only_on_key_and_position():
    logits = np.random.default_rng(0).normal(0, 1, (3, V)).astype(np.float32)
    logits[2] = logits[0]
    keys = row_keys(np.array([5, 6, 5], np.uint32), None)
    batch = sample_tokens(logits, keys, np.array([11, 11, 11]))
    assert batch[0] == batch[2]
    assert sample_tokens(logits[:1], keys[:1], np.array([11]))[0] == batch[0]
    distinct = {int(sample_tokens(logits[:1], keys[:1], np.array([p]))[0]) for p in range(40)}
    assert len(distinct) > 5


def test_row_keys_differ_within_a_seed():
    keys = row_keys(np.array([5, 5], np.uint32), np.array([0, 1], np.uint32))
    want = [jax.random.fold_in(jax.random.key(5), i) for i in range(2)]
    for key, other in zip(keys, want, strict=True):
        np.testing.assert_array_equal(key, jax.random.key_data(other))
