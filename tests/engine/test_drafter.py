"""Tests of when a row proposes tokens, and when verifying them pays, without a model."""

import numpy as np
import pytest

from dbrx_jax.engine.drafter import Drafter
from dbrx_jax.engine.speculation import Speculation, check_speculation
from dbrx_jax.errors import GenerationError


def test_proposals_follow_the_prompt_and_the_new_tokens():
    drafter = Drafter([1, 2, 3, 4, 5, 1], num_tokens=3, limit=100)
    assert drafter.propose([]).size == 0
    assert drafter.propose([2]).tolist() == [3, 4, 5]
    assert drafter.propose([2]).tolist() == [3, 4, 5]  # the same tokens again
    assert drafter.propose([2, 7, 8, 2, 7]).tolist() == [8, 2, 7]


@pytest.mark.parametrize(("known", "expected"), [(7, 4), (9, 2), (10, 1), (11, 0), (12, 0)])
def test_no_proposal_exceeds_the_rows_limit(known, expected):
    """A step adds one token more than are accepted."""
    drafter = Drafter([6] * 9, num_tokens=4, limit=12)
    assert drafter.propose([6] * known).tolist() == [6] * expected


def test_row_pauses_twice_as_long_after_each_refusal():
    drafter, tokens, pauses = Drafter([6] * 9, num_tokens=4, limit=9999), [], []
    for _ in range(9):
        drafter.take_result(4, 1, len(tokens))
        begin = len(tokens)
        while not len(drafter.propose(tokens)):
            tokens.append(6)
        pauses.append(len(tokens) - begin)
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 256]
    drafter.take_result(4, 2, len(tokens))  # half are accepted
    assert len(drafter.propose(tokens)) == 4
    drafter.take_result(4, 1, len(tokens))
    assert len(drafter.propose([*tokens, 6])) == 0
    assert len(drafter.propose([*tokens, 6, 6])) == 4


def test_what_was_refused_is_forgotten():
    drafter = Drafter([6] * 9, num_tokens=4, limit=9999)
    assert drafter.rate == 1
    for _ in range(2):
        drafter.take_result(4, 2, 10)
    assert drafter.rate < 0.8
    rates = []
    for number in (10, 74, 266, 999):
        drafter.propose([6] * number)
        rates.append(drafter.rate)
    np.testing.assert_allclose(rates, [0.78125, 0.8359375, 1, 1])
    drafter.take_result(4, 0, 1003)
    assert drafter.rate == 0.75


class FakeRow:
    """A row that repeats itself, or one without proposals."""

    def __init__(self, repeats):
        self.drafter, self.tokens = Drafter([6] * 9, num_tokens=4, limit=99) if repeats else None, []


def test_rows_propose_only_what_pays():
    """A step that verifies takes twice as long for 8 rows: they must be likely to get 8 tokens more."""
    speculation = Speculation(4, {1: 1.2, 8: 2.0, 16: 1.1})
    rows = [FakeRow(True) for _ in range(3)]
    others = [FakeRow(False) for _ in range(5)]
    assert list(speculation.propose(rows + others)) == rows
    assert speculation.propose(rows[:2] + others + others[:1]) == {}
    assert list(speculation.propose(rows[:2] + others + others)) == rows[:2]
    speculation.take_result(rows[0], 4, 2)
    assert rows[0].drafter.rate == 0.875
    assert speculation.propose(rows + others).keys() == set(rows)  # 3.5 + 4 + 4
    for _ in range(20):
        for row in rows:
            speculation.take_result(row, 4, 2)
    assert speculation.propose(rows + others) == {}
    assert (speculation.proposed, speculation.accepted) == (4 * 61, 2 * 61)
    assert Speculation(0, {}).drafter(np.arange(3), 9, False) is None
    assert Speculation(2, {}).drafter(np.arange(3), 9, True) is None


@pytest.mark.parametrize("number", [-1, 15, 2.0, True])
def test_numbers_out_of_range_are_refused(number):
    with pytest.raises(GenerationError, match="speculation: expected a number from 0 to 14, got"):
        check_speculation(number, False)
    assert check_speculation(14, False) == 14


def test_batch_invariant_rows_have_no_speculation():
    assert check_speculation(0, True) == 0
    with pytest.raises(GenerationError, match="its steps of several tokens have other bits; leave out batch_invariant"):
        check_speculation(1, True)
