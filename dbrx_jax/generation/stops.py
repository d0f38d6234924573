"""Stops rows on the host: at stop strings, by the caller's criteria, and at a time limit."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from dbrx_jax.errors import GenerationError
from dbrx_jax.text.tokenizer import DbrxTokenizer

# Called with the sequences so far (B, T + n) and None; returns whether all rows, or each (B,), shall end.
StoppingCriterion: TypeAlias = Callable[[np.ndarray, None], Any]


class StopSearch:
    """Searches one row's text for stop strings as it grows."""

    def __init__(self, tokenizer: DbrxTokenizer, strings: Sequence[str]):
        self._tokenizer = tokenizer
        self._strings = [s.encode() for s in strings]
        self._tail = b""  # the end of the text so far, in which a stop string may begin
        self._max_tail = max(map(len, self._strings)) - 1

    def push(self, tokens: np.ndarray) -> int | None:
        """Returns the number of these tokens that complete a stop string, or None."""
        for count, token in enumerate(tokens, 1):
            text = self._tail + self._tokenizer.token_bytes(int(token), skip_special_tokens=True)
            if any(s in text for s in self._strings):
                return count
            self._tail = text[max(0, len(text) - self._max_tail) :]
        return None


class Deadline:
    """Ends all rows when `seconds` have passed since the first call, counted between bursts."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._begin: float | None = None

    def start(self) -> None:
        self._begin = time.monotonic()

    def is_over(self) -> bool:
        return self._begin is not None and time.monotonic() - self._begin >= self._seconds


def stopped_lengths(
    criteria: Sequence[StoppingCriterion], sequences: np.ndarray, new_tokens: np.ndarray
) -> list[int | None]:
    """Returns for each row the number of new tokens after which a criterion ends it, or None.

    Every criterion sees the sequences after each token, as in transformers, although the device may be ahead.

    Args:
      sequences: the tokens before (B, T + n).
      new_tokens: (B, m).

    Raises:
      GenerationError: a criterion returns neither one truth value nor one for each row.
    """
    rows = len(sequences)
    lengths: list[int | None] = [None] * rows
    for count in range(1, new_tokens.shape[1] + 1):
        so_far = np.concatenate([sequences, new_tokens[:, :count]], axis=1)
        for criterion in criteria:
            answer = np.asarray(criterion(so_far, None))
            if answer.shape not in ((), (rows,)) or answer.dtype != bool:
                raise GenerationError(
                    f"stopping_criteria: expected True or False, or one for each of {rows} rows, got {answer!r:.60}"
                )
            for row in np.flatnonzero(np.broadcast_to(answer, rows)):
                lengths[row] = lengths[row] or count
    return lengths
