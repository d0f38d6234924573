"""Device: runs the scheduler's steps, whose rows it turns into arrays."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from dbrx_jax.engine.programs import COPIES, MASKS, Programs
from dbrx_jax.engine.rows import Row, token_logprobs
from dbrx_jax.engine.scheduler import MAX_SEGMENTS, Limits, Step, table_of
from dbrx_jax.engine.slots import SlotStart
from dbrx_jax.generation.state import Outputs


class Results(NamedTuple):
    """New tokens of rows, still on the devices."""

    rows: list[Row]
    steps: int  # that each row was promised
    outputs: Outputs
    counts: Any = None  # new tokens of each row, if they are not outputs.num_steps
    proposals: Mapping[Row, np.ndarray] = MappingProxyType({})  # that were verified

    def fetch(self) -> tuple[Any, np.ndarray]:
        """Waits for the tokens; returns the Outputs as numpy arrays, and the number of new tokens of each row."""
        outputs, counts = jax.device_get((self.outputs, self.counts))  # starts all copies before it waits for one
        return outputs, np.full(len(self.rows), outputs.num_steps) if counts is None else counts


class PromptScores(NamedTuple):
    """Log-probabilities of what follows the tokens of a row's chunk, still on the devices."""

    row: Row
    start: int  # position of the first
    num_tokens: int
    logprobs: Any  # (T,)
    top_ids: Any  # (T, n)
    top_logprobs: Any

    def record(self) -> None:
        """Waits for them, and adds them to those of the prompt, unless the prompt is computed again."""
        job, wanted = self.row.job, self.row.job.request.prompt_logprobs
        logprobs, ids, tops = (np.asarray(a) for a in (self.logprobs, self.top_ids, self.top_logprobs))
        known = job.prompt_logprobs or [None]
        for i in range(len(known) - 1 - self.start, min(self.num_tokens, len(job.prompt) - 1 - self.start)):
            token = int(job.prompt[self.start + i + 1])
            known.append(token_logprobs(token, logprobs[i], ids[i], tops[i], wanted or 0))
        job.prompt_logprobs = known


class ChunkEnd(NamedTuple):
    """The end of a chunk with no tokens to wait for; awaited, so that the host is at most one chunk ahead."""

    last: Any

    def record(self) -> None:
        """Waits for it."""
        jax.block_until_ready(self.last)


InFlight = Results | PromptScores | ChunkEnd


class Device:
    """Runs steps of rows."""

    def __init__(self, programs: Programs, limits: Limits):
        self._programs, self._limits = programs, limits
        self._width = programs.positions // limits.block

    def run(self, step: Step) -> list[InFlight]:
        """Starts a step; returns what it will compute, in order."""
        results: list[InFlight] = []
        if step.prefill is not None:
            results += self._prefill(step)
            self.copy(step.copies)
            for row, _ in step.started:
                self._write_row(row)
            self._write_masks([row for row, _ in step.started if row.matcher is not None])
            for i in range(0, len(step.started), MAX_SEGMENTS):
                results.append(self._sample_first(step.started[i : i + MAX_SEGMENTS]))
        self._write_masks([row for row in step.decode if row.matcher is not None])
        if step.decode:
            results.append(self._verify(step) if step.proposals else self._decode(step))
        if step.prefill is not None and not results:
            results.append(ChunkEnd(self._programs.last))
        return results

    def _prefill(self, step: Step) -> list[PromptScores]:
        """Starts a step's chunks; returns the scores that are wanted."""
        assert step.prefill is not None
        rows, starts, counts, (num_rows, length) = step.prefill
        tokens, spans = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, 2), np.int32)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            tokens[i, :count] = row.sequence[start : start + count]
            spans[i] = start, count
        self._programs.prefill(table_of(rows, num_rows, self._width), tokens, spans)
        if not rows[0].job.is_scored:
            return []
        following = rows[0].sequence[starts[0] + 1 :][: counts[0]]
        targets = np.pad(following, (0, length - len(following)))[None].astype(np.int32)
        return [PromptScores(rows[0], starts[0], counts[0], *self._programs.score(targets))]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks to others; from block 0, which is zero, to clear them."""
        for i in range(0, len(pairs), COPIES):
            some = pairs[i : i + COPIES]
            array = np.zeros((1, COPIES, 2), np.int32)
            array[0, : len(some)] = some
            self._programs.copy(array)

    def _write_row(self, row: Row) -> None:
        """Puts a row in its slot, before its next token."""
        start = SlotStart(row.slot, len(row.sequence), row.generated, row.job.limit)
        tokens = np.pad(row.sequence, (0, self._programs.positions - len(row.sequence)))
        self._programs.write_row(row.settings, tokens, np.array(start, np.int32))

    def _write_masks(self, rows: Sequence[Row]) -> None:
        """Writes the masks of rows whose next token is constrained."""
        for i in range(0, len(rows), MASKS):
            some = rows[i : i + MASKS]
            masks = np.stack([row.matcher.mask() for row in some if row.matcher is not None])
            padded = np.zeros((MASKS, self._programs.mask_width), np.uint32)
            padded[: len(masks), : masks.shape[1]] = masks
            self._programs.write_masks(self._slots(some, MASKS), padded)

    def _sample_first(self, started: Sequence[tuple[Row, int]]) -> Results:
        size = next(n for n in self._limits.first_buckets if n >= len(started))
        segments = np.zeros(size, np.int32)
        segments[: len(started)] = [segment for _, segment in started]
        rows = [row for row, _ in started]
        return Results(rows, 1, self._programs.sample_first(self._slots(rows, size), segments))

    def _decode(self, step: Step) -> Results:
        slots, table = self._slots_and_table(step.decode)
        outputs = self._programs.decode(slots, table, step.steps)
        return Results(list(step.decode), step.steps, outputs)

    def _verify(self, step: Step) -> Results:
        slots, table = self._slots_and_table(step.decode)
        proposed, counts = np.zeros((len(slots), self._limits.speculation), np.int32), np.zeros(len(slots), np.int32)
        for i, row in enumerate(step.decode):
            tokens = step.proposals.get(row, ())
            proposed[i, : len(tokens)], counts[i] = tokens, len(tokens)
        outputs, new = self._programs.verify(slots, table, proposed, counts)
        return Results(list(step.decode), step.steps, outputs, new, step.proposals)

    def _slots_and_table(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the slots and the blocks of rows to decode, padded to the next size of a program."""
        size = next(b for b in self._limits.row_buckets if b >= len(rows))
        return self._slots(rows, size), table_of(rows, size, self._width)

    def _slots(self, rows: Sequence[Row], size: int) -> np.ndarray:
        """Returns the slots of rows, padded to a number of rows."""
        slots = np.full(size, self._programs.num_slots, np.int32)
        slots[: len(rows)] = [row.slot for row in rows]
        return slots
