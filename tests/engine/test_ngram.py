"""Tests of prompt lookup against a naive search, and of speculation against plain decoding."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dbrx_jax.engine.ngram import PromptLookup, accepted_length

FEW_TOKENS = st.lists(st.integers(0, 2), max_size=40)


def naive_proposal(tokens, max_ngram, num_tokens):
    """Returns what follows the latest earlier occurrence of the longest suffix of 2 … max_ngram tokens."""
    for n in range(min(max_ngram, len(tokens)), 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + num_tokens]
    return []


@given(st.lists(FEW_TOKENS, max_size=6), st.integers(2, 5), st.integers(0, 7))
def test_proposals_are_those_of_a_naive_search(pieces, max_ngram, num_tokens):
    lookup, tokens = PromptLookup(max_ngram=max_ngram), []
    for piece in pieces:
        lookup.append(piece)
        tokens += piece
        assert lookup.propose(num_tokens).tolist() == naive_proposal(tokens, max_ngram, num_tokens)


def test_longest_and_latest_occurrence_is_proposed():
    # 1 2 3 occurs once, 2 3 twice.
    lookup = PromptLookup([1, 2, 3, 40, 41, 7, 2, 3, 50, 51, 1, 2, 3])
    np.testing.assert_array_equal(lookup.propose(2), [40, 41])
    lookup = PromptLookup([1, 2, 3, 40, 41, 7, 2, 3, 50, 51, 9, 2, 3])
    np.testing.assert_array_equal(lookup.propose(9), [50, 51, 9, 2, 3])
    assert lookup.propose(9).dtype == np.int32
    lookup.append(np.array([60], np.int32))
    assert lookup.propose(9).size == 0


def test_accepted_proposals_are_a_prefix():
    sampled = np.array([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    proposed = np.array([[1, 2, 3]] * 5)
    got = jax.jit(accepted_length)(sampled, proposed, np.array([3, 3, 3, 2, 0]))
    np.testing.assert_array_equal(got, [3, 1, 0, 2, 0])
    assert got.dtype == np.int32
    assert accepted_length(sampled[:, :1], proposed[:, :0], np.zeros(5, int)).tolist() == [0] * 5


@given(FEW_TOKENS.filter(len), st.integers(0, 3), st.integers(0, 1000))
def test_speculation_gives_the_tokens_of_plain_decoding(prompt, num_proposed, seed):
    """A token is a function of all tokens before it and of the noise of its position, as in the model."""

    def sample(tokens):
        return hash((seed, len(tokens), *tokens[-3:])) % 3

    plain = list(prompt)
    for _ in range(20):
        plain.append(sample(plain))
    tokens, lookup, steps = list(prompt), PromptLookup(prompt), 0
    while len(tokens) < len(plain):
        proposed = lookup.propose(num_proposed).tolist()
        sampled = [sample(tokens + proposed[:i]) for i in range(len(proposed) + 1)]
        padded = [proposed + [0] * (3 - len(proposed))]
        accepted = int(accepted_length([sampled + [0] * (3 - len(proposed))], padded, [len(proposed)])[0])
        tokens += sampled[: accepted + 1]
        lookup.append(sampled[: accepted + 1])
        steps += 1
    assert tokens[: len(plain)] == plain
    assert num_proposed > 0 or steps == 20
