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
    """Searches one row's text, with that of special tokens, for stop strings as it grows."""

    def __init__(self, tokenizer: DbrxTokenizer, strings: Sequence[str]):
        self._tokenizer = tokenizer
        self._strings = [s.encode() for s in strings]
        self._tail = b""  # the end of the text so far, in which a stop string may begin
        self._max_tail = max(map(len, self._strings)) - 1

    def push(self, tokens: np.ndarray) -> int | None:
        """Returns the number of these tokens that complete a stop string, or None."""
        for count, token in enumerate(tokens, 1):
            text = self._tail + self._tokenizer.token_bytes(int(token))
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


def ends_by_criteria(
    criteria: Sequence[StoppingCriterion],
    sequences: np.ndarray,
    new_tokens: np.ndarray,
    ends: np.ndarray,
    pad_token_id: int,
) -> np.ndarray:
    """Returns the number of new tokens after which each row ends (B,), by itself or because a criterion ends it.

    Criteria are called as in transformers, although the device may be ahead: after each token until all rows have
    ended, with padding behind the rows that have.

    Args:
      sequences: the tokens before (B, T + n).
      new_tokens: (B, m).
      ends: the number of new tokens after which each row ends by itself; more than m if it goes on.

    Raises:
      GenerationError: a criterion returns neither one truth value nor one for each row.
    """
    rows = len(sequences)
    for count in range(1, new_tokens.shape[1] + 1):
        if (ends < count).all():
            break
        tokens = np.where(np.arange(count) < ends[:, None], new_tokens[:, :count], pad_token_id)
        so_far = np.concatenate([sequences, tokens], axis=1, dtype=np.int32)
        for criterion in criteria:
            answer = np.asarray(criterion(so_far, None))
            if answer.shape not in ((), (rows,)) or answer.dtype != bool:
                raise GenerationError(
                    f"stopping_criteria: expected True or False, or one for each of {rows} rows, got {answer!r:.60}"
                )
            ends = np.where(answer, np.minimum(ends, count), ends)
    return ends
