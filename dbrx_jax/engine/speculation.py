"""Speculation in the engine: proposals of its rows, which one step verifies together."""

from collections.abc import Collection, Mapping

import numpy as np

from dbrx_jax.engine.drafter import Drafter
from dbrx_jax.engine.rows import Row
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.verify import MAX_PROPOSED


def check_speculation(num_tokens: int, batch_invariant: bool) -> int:
    """Returns the number of tokens to propose.

    Raises:
      GenerationError: it is out of range, or bits must not depend on the batch.
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 0 <= num_tokens <= MAX_PROPOSED:
        raise GenerationError(f"speculation: expected a number from 0 to {MAX_PROPOSED}, got {num_tokens!r:.40}")
    if num_tokens and batch_invariant:
        raise GenerationError("speculation: its steps of several tokens have other bits; leave out batch_invariant")
    return num_tokens


class Speculation:
    """Asks rows for proposals where they pay, and counts what becomes of them.

    Args:
      num_tokens: most tokens of a proposal; 0 is off.
      costs: for numbers of rows, ascending, how many times as long as decoding them a step that verifies takes.
    """

    def __init__(self, num_tokens: int, costs: Mapping[int, float]):
        self._num_tokens, self._costs = num_tokens, costs
        self.proposed = self.accepted = 0  # tokens

    def drafter(self, prompt: np.ndarray, limit: int, is_constrained: bool) -> Drafter | None:
        """Returns what proposes tokens for a row; None for a constrained one, whose mask is of one token."""
        return Drafter(prompt, self._num_tokens, limit) if self._num_tokens and not is_constrained else None

    def propose(self, rows: Collection[Row]) -> dict[Row, np.ndarray]:
        """Returns proposals, which follow the tokens that are known, of some of the rows that run.

        There are none if it takes longer to verify them than to decode what is likely to be accepted.
        """
        proposals, likely = {}, 0.0
        for row in rows:
            if row.drafter is not None and len(tokens := row.drafter.propose(row.tokens)):
                proposals[row] = tokens
                likely += row.drafter.rate * len(tokens)
        cost = next((cost for size, cost in self._costs.items() if size >= len(rows)), 1.0)
        return proposals if likely > (cost - 1) * len(rows) else {}

    def take_result(self, row: Row, num_proposed: int, num_accepted: int) -> None:
        """Takes what was accepted of a row's proposal, after its new tokens."""
        assert row.drafter is not None
        row.drafter.take_result(num_proposed, num_accepted, len(row.tokens))
        self.proposed += num_proposed
        self.accepted += num_accepted
