"""Speculation by prompt lookup: proposes the tokens that followed the last tokens of a row earlier in that row.

The model computes the logits after all proposals in one step, and samples a token after each. A proposal is accepted
while it equals the sampled token. Noise depends on seed and position alone, so the row's tokens are the very ones that
it would have without speculation, greedy or sampled.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int

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
        """Returns the int32 tokens, at most num_tokens, after the latest earlier occurrence of the longest suffix."""
        for n in self._sizes:
            position = self._next[n].get(tuple(self._tokens[-n:]))
            if position is not None:
                return np.array(self._tokens[position : position + num_tokens], np.int32)
        return np.zeros(0, np.int32)


def accepted_length(
    sampled: Int[ArrayLike, "R k+1"], proposed: Int[ArrayLike, "R k"], num_proposed: Int[ArrayLike, "R"]
) -> Int[Array, "R"]:
    """Returns the number of proposals of each row that equal the tokens sampled there, up to the first that does not.

    A row with `a` accepted proposals goes on with sampled[:a + 1]: the last of these replaces the refused proposal, or
    follows the last one.

    Args:
      sampled: token i is sampled after the row and its first i proposals.
      proposed: padded behind num_proposed.
    """
    sampled, proposed, num_proposed = jnp.asarray(sampled), jnp.asarray(proposed), jnp.asarray(num_proposed)
    k = proposed.shape[1]
    is_accepted = (sampled[:, :k] == proposed) & (jnp.arange(k) < num_proposed[:, None])
    return jnp.cumprod(is_accepted.astype(jnp.int32), axis=1).sum(axis=1)
