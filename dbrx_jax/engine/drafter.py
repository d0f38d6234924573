"""Drafter: proposes the next tokens of one row, and pauses while most of what it proposes is refused."""

from collections.abc import Sequence

import numpy as np

from dbrx_jax.engine.ngram import PromptLookup

FIRST_PAUSE, LONGEST_PAUSE = 2, 256  # new tokens
MEMORY = 0.75  # weight of earlier steps in the rate


class Drafter:
    """Proposes tokens by prompt lookup.

    After a step that refuses more than half of its proposals a row proposes nothing for 2 tokens, after the next such
    step for 4, then 8, up to 256. A step that accepts half of them or more starts this anew. So a row whose text does
    not repeat itself pays for about log2 of its tokens.

    Args:
      prompt: token ids.
      num_tokens: most tokens of a proposal.
      limit: most new tokens of the row.
    """

    def __init__(self, prompt: Sequence[int] | np.ndarray, num_tokens: int, limit: int):
        self._prompt, self._num_tokens, self._limit = prompt, num_tokens, limit
        self._lookup: PromptLookup | None = None  # until the row runs: a row that waits needs no memory for it
        self._num_known = 0  # new tokens in the lookup
        self._rate, self._last = 1.0, 0  # the rate after the last result, and the number of new tokens then
        self._pause, self._resume = FIRST_PAUSE, 0  # the next pause, and the number of new tokens that ends this one

    @property
    def rate(self) -> float:
        """Share of the proposed tokens that was accepted lately: 1 at first, and again after LONGEST_PAUSE tokens."""
        forgotten = min(1.0, max(0, self._num_known - self._last) / LONGEST_PAUSE)
        return self._rate + (1 - self._rate) * forgotten

    def propose(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns int32 tokens that may follow the row's new tokens so far; none that would exceed its limit."""
        if self._lookup is None:
            self._lookup = PromptLookup(self._prompt)
        self._lookup.append(tokens[self._num_known :])
        self._num_known = len(tokens)
        if len(tokens) < self._resume:
            return np.zeros(0, np.int32)
        return self._lookup.propose(min(self._num_tokens, self._limit - len(tokens) - 1))

    def take_result(self, num_proposed: int, num_accepted: int, num_tokens: int) -> None:
        """Takes the result of a step, after which the row has so many new tokens."""
        self._rate, self._last = MEMORY * self.rate + (1 - MEMORY) * num_accepted / num_proposed, num_tokens
        if 2 * num_accepted >= num_proposed:
            self._pause = FIRST_PAUSE
        else:
            self._resume = num_tokens + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
