"""Tests of sampling: filters against transformers' definitions in NumPy, and samples against their distribution."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.generation.sampling import Sampling, row_keys, sample_tokens

V = 23


def make_sampling(temperature=1.0, top_k=V, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    return Sampling(
        *(
            np.float32(temperature),
            np.int32(top_k),
            np.float32(top_p),
            np.float32(min_p),
            np.float32(repetition_penalty),
        )
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept_by_transformers(logits, temperature, top_k, top_p, min_p):
    """Returns the tokens that the logits warpers of transformers 4.57 keep, applied in order to one row."""
    scores = logits / temperature
    scores[scores < np.sort(scores)[-top_k]] = -np.inf
    order = np.argsort(scores)
    cumulative = np.cumsum(softmax(scores[order]))
    remove = cumulative <= 1 - top_p
    remove[-1] = False
    scores[order[remove]] = -np.inf
    probs = softmax(scores)
    scores[probs < min_p * probs.max()] = -np.inf
    return np.isfinite(scores)


sample_rows = jax.jit(jax.vmap(sample_tokens, in_axes=(None, None, 0, None, None, None)), static_argnums=5)


def sample_many(logits, settings, count=400, seen=None, filtered=True):
    """Samples `count` tokens for one row."""
    seen = np.zeros((1, V), bool) if seen is None else seen
    keys = jax.vmap(lambda i: row_keys(i[None], None))(np.arange(count, dtype=np.uint32))
    return np.asarray(sample_rows(logits[None], seen, keys, np.array([7]), settings, filtered))[:, 0]


@settings(max_examples=60)
@given(
    st.integers(0, 9999),
    st.floats(0.2, 3),
    st.integers(1, V),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_samples_match_transformers_filters(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)
    want = kept_by_transformers(logits.astype(np.float64), temperature, top_k, top_p, min_p)
    tokens = sample_many(logits, make_sampling(temperature, top_k, top_p, min_p))
    assert want[tokens].all()
    probs = softmax(np.where(want, logits / temperature, -np.inf))
    likely = np.flatnonzero(probs > 0.05)  # one is absent from 400 samples with probability under 1e-8
    assert set(likely) <= set(tokens)


def test_samples_follow_the_distribution():
    logits = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
    tokens = sample_many(logits, make_sampling(temperature=1.3), count=20000, filtered=False)
    frequency = np.bincount(tokens, minlength=V) / len(tokens)
    probs = softmax(logits / 1.3)
    assert (np.abs(frequency - probs) < 5 * np.sqrt(probs * (1 - probs) / len(tokens)) + 1e-4).all()


def test_greedy_selects_the_lowest_id_of_equal_logits():
    logits = np.zeros((2, V), np.float32)
    logits[1, [4, 9]] = 3
    out = sample_tokens(logits, np.zeros((2, V), bool), None, np.array([0, 0]), make_sampling(), False)
    np.testing.assert_array_equal(out, [0, 4])


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_penalty_matches_transformers(penalty):
    """Positive scores are divided and negative scores multiplied, as in transformers."""
    logits = np.array([[2.0, -1.0, 1.5, -0.9]], np.float32)
    for seen in ([0], [0, 2], [1, 3], [0, 1, 2, 3], []):
        mask = np.isin(np.arange(4), seen)[None]
        want = np.where(mask, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        out = sample_tokens(logits, mask, None, np.array([0]), make_sampling(repetition_penalty=penalty), False)
        assert out[0] == want.argmax(), seen


def test_sample_depends_only_on_key_and_position():
    logits = np.random.default_rng(0).normal(0, 1, (3, V)).astype(np.float32)
    logits[2] = logits[0]
    keys = row_keys(np.array([5, 6, 5], np.uint32), None)
    seen, positions = np.zeros((3, V), bool), np.array([11, 11, 11])
    batch = sample_tokens(logits, seen, keys, positions, make_sampling(), False)
    assert batch[0] == batch[2]
    assert sample_tokens(logits[:1], seen[:1], keys[:1], positions[:1], make_sampling(), False)[0] == batch[0]
    distinct = {
        int(sample_tokens(logits[:1], seen[:1], keys[:1], np.array([p]), make_sampling(), False)[0]) for p in range(40)
    }
    assert len(distinct) > 5


def test_row_keys_differ_within_a_seed():
    keys = row_keys(np.array([5, 5], np.uint32), np.array([0, 1], np.uint32))
    want = [jax.random.fold_in(jax.random.key(5), i) for i in range(2)]
    for key, other in zip(keys, want, strict=True):
        np.testing.assert_array_equal(key, jax.random.key_data(other))
