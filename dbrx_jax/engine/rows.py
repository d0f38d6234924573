"""Rows of the engine: completions that wait, are prefilled, or are decoded."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dbrx_jax.engine.constraints import Matcher
from dbrx_jax.engine.drafter import Drafter
from dbrx_jax.engine.request import Chunk, FinishReason, Request, TokenLogprobs
from dbrx_jax.engine.slots import SlotRow
from dbrx_jax.generation.stops import StopSearch
from dbrx_jax.text.stop_text import StopText
from dbrx_jax.text.tokenizer import DbrxTokenizer


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine: its completions share a prompt.

    Attributes:
      prompt: int32.
      limit: most new tokens of a completion.
      put: takes each Chunk, and at last an exception or None.
      hashes: of the prompt's full blocks, for the prefix cache.
      start: time at which its prompt began to run.
    """

    request: Request
    prompt: np.ndarray
    limit: int
    put: Callable[[Chunk | BaseException | None], None]
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    rows: list["Row"] = dataclasses.field(default_factory=list)
    arrival: float = dataclasses.field(default_factory=time.monotonic)
    start: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=list)  # so far, if they are wanted
    is_over: bool = False

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted."""
        return self.request.prompt_logprobs is not None

    @property
    def deadline(self) -> float:
        """Time at which the request must have ended."""
        return np.inf if self.request.timeout is None else self.arrival + self.request.timeout

    @property
    def is_out_of_time(self) -> bool:
        """True if it has run for the max_time of its options."""
        limit = self.request.config.max_time
        return limit is not None and self.start is not None and time.monotonic() - self.start >= limit


@dataclasses.dataclass(eq=False)
class Row:
    """One completion of a job.

    Attributes:
      settings: its options, for a slot.
      admission: number of the row in the order of admission.
      tokens: new tokens that the host knows.
      sequence: tokens that prefill computes: the prompt, and new ones if the row was put back.
      computed: number of these that are in the cache, or in a program that was started.
      last_chunk: number of the engine's chunk that was the row's last, or when the row was admitted.
      pending: decode steps that were started and whose tokens the host does not know yet.
      generated: number of new tokens since the row was admitted last; tokens up to len(tokens) are known from before.
    """

    job: Job
    index: int
    settings: SlotRow
    text: "RowText"
    matcher: Matcher | None = None  # limits the tokens that may come next
    drafter: Drafter | None = None  # proposes the tokens that may come next
    tokens: list[int] = dataclasses.field(default_factory=list)
    sequence: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    blocks: list[int] = dataclasses.field(default_factory=list)
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    chunks: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # to come, of the sequence
    slot: int = -1
    admission: int = -1
    computed: int = 0
    last_chunk: int = 0
    pending: int = 0
    generated: int = 0
    num_recorded: int = 0  # first blocks that are in the prefix cache
    is_finished: bool = False

    @property
    def is_prefilled(self) -> bool:
        return self.computed == len(self.sequence)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the row that the host knows, without those that are computed again."""
        return len(self.job.prompt) + self.generated


class RowText:
    """Text of a completion, and where its stop strings end it."""

    def __init__(self, tokenizer: DbrxTokenizer | None, stop_strings: Sequence[str], eos: Sequence[int]):
        self._eos = frozenset(eos)
        self._search = StopSearch(tokenizer, stop_strings) if tokenizer is not None and stop_strings else None
        self._text = None if tokenizer is None else StopText(tokenizer.stream(), stop_strings)

    def end_of(self, tokens: Sequence[int]) -> int | None:
        """Returns the number of these tokens after which a token or a stop string ends the row, or None."""
        end = next((i for i, token in enumerate(tokens, 1) if token in self._eos), None)
        if self._search is not None:
            found = self._search.push(np.asarray(tokens[:end]))
            end = end if found is None else found
        return end

    def push(self, tokens: Sequence[int], is_last: bool) -> str:
        """Returns the text that these tokens complete."""
        if self._text is None:
            return ""
        return self._text.push(tokens) + (self._text.finish() if is_last else "")


def make_chunk(
    row: Row, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], reason: FinishReason | None
) -> Chunk:
    """Returns the chunk of a row's new tokens."""
    text = row.text.push(tokens, reason is not None)
    return Chunk(row.index, tuple(tokens), text, tuple(logprobs), reason)


def token_logprobs(token: int, logprob: float, top_ids: Any, top_values: Any, number: int) -> TokenLogprobs:
    """Returns a token's log-probability with those of the `number` most probable tokens.

    If it is one of these, its log-probability is the same to the last bit.
    """
    top = tuple((int(i), float(v)) for i, v in zip(top_ids[:number], top_values[:number], strict=True))
    return TokenLogprobs(int(token), dict(top).get(int(token), float(logprob)), top)
