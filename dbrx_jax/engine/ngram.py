"""Speculation by prompt lookup: proposes the tokens that followed the last tokens of a row earlier in that row.

generation/verify.py adds those that are right.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Iterable

import numpy as np

MIN_NGRAM = 2  # tokens; one alone recurs too often to tell what follows


class PromptLookup:
    """An index of the n-grams of one row; appending a token costs O(max_ngram), proposing does too.

    Args:
      tokens: the prompt.
      max_ngram: length of the longest n-grams; the shortest have MIN_NGRAM tokens.
    """

    def __init__(self, tokens: Iterable[int] = (), max_ngram: int = 3):
        self._sizes = range(max_ngram, MIN_NGRAM - 1, -1)
        self._tokens: list[int] = []
        # For each size, the position after the latest n-gram that has a token after it.
        self._next: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in self._sizes}
        self.append(tokens)

    def append(self, tokens: Iterable[int]) -> None:
        """Appends tokens of the prompt, or new ones."""
        begin = len(self._tokens)
        self._tokens += map(int, tokens)
        for n, positions in self._next.items():
            followers = range(max(begin, n), len(self._tokens))  # new tokens that follow an n-gram
            window = self._tokens[followers.start - n :]
            ngrams = zip(*(window[i : i + len(followers)] for i in range(n)), strict=True)
            positions.update(zip(ngrams, followers, strict=True))

    def propose(self, num_tokens: int) -> np.ndarray:
        """Returns the int32 tokens that followed the latest earlier occurrence of the longest suffix.

        They are num_tokens, or none if there is no such occurrence. Where it ends too close to the row's end, the row
        repeats what is between, and the proposal goes on like that.
        """
        for n in self._sizes:
            position = self._next[n].get(tuple(self._tokens[-n:]))
            if position is not None:
                following = self._tokens[position : position + num_tokens]
                return np.resize(np.array(following, np.int32), max(0, num_tokens))
        return np.zeros(0, np.int32)
