"""Tests of prompt lookup against a naive search."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dbrx_jax.engine.ngram import PromptLookup

FEW_TOKENS = st.lists(st.integers(0, 2), max_size=40)


def naive_proposal(tokens, max_ngram, num_tokens):
    """Returns what follows the latest earlier occurrence of the longest suffix of 2 … max_ngram tokens."""
    for n in range(min(max_ngram, len(tokens)), 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                following = tokens[start + n :]
                return (following * num_tokens)[:num_tokens]
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
    np.testing.assert_array_equal(lookup.propose(7), [50, 51, 9, 2, 3, 50, 51])
    assert lookup.propose(-1).size == 0
    assert lookup.propose(9).dtype == np.int32
    lookup.append(np.array([60], np.int32))
    assert lookup.propose(9).size == 0
