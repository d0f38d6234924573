"""Scheduler: decides which rows the next step prefills and decodes, and which blocks they get.

First come, first served. A row is admitted when a slot and the blocks of its prompt are free. Prompts are prefilled a
chunk at a time, mostly of the one with least left, so that a long one does not hold up short ones. If a row needs a
block and none is free, the row that was admitted last is put back and computed again later.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dbrx_jax.engine.blocks import SPARE, BlockPool, block_hashes
from dbrx_jax.engine.rows import Job, Row

MAX_SEGMENTS = 16  # prompts of one chunk, and rows whose first tokens one program samples
PATIENCE = 4  # every so many chunks one is of the prompt that waits longest for one, however much is left of it


class Shapes(NamedTuple):
    """Sizes of the programs that a known load needs."""

    rows: tuple[int, ...]  # of decode, ascending
    chunks: tuple[tuple[int, int], ...]  # numbers of prompts and lengths of chunks, by ascending length
    first: tuple[int, ...]  # rows whose first tokens are sampled together


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of an engine.

    Attributes:
      max_rows: rows that run at once.
      max_waiting: requests that wait.
      positions: most tokens of a row.
      block: positions of a block of the cache.
      chunk_lengths: of prefill, ascending.
      prefill_budget: most tokens of a step's chunks.
      budgets: the same beside the rows of each bucket; none if it does not depend on them.
      steps: most decode steps of one program.
      batch_invariant: bits of a row must not depend on others: prompts have chunks of their own.
      speculation: most tokens that are proposed for a row in a step.
      shapes: of the programs; None is those that any load may need.
    """

    max_rows: int
    max_waiting: int
    positions: int
    block: int
    chunk_lengths: tuple[int, ...]
    prefill_budget: int
    steps: int
    batch_invariant: bool = False
    budgets: tuple[int, ...] = ()
    speculation: int = 0
    shapes: Shapes | None = None

    @property
    def first_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that programs which sample first tokens are compiled for."""
        return (8 if self.batch_invariant else 1, MAX_SEGMENTS)

    @property
    def first_sizes(self) -> tuple[int, ...]:
        """Those of them that are compiled before they are needed."""
        return self.first_buckets if self.shapes is None else self.shapes.first

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that decode programs are compiled for."""
        if self.shapes is not None:
            return self.shapes.rows
        smallest = (8,) if self.batch_invariant else (1, 8)
        buckets = [*smallest, 16]
        while buckets[-1] < self.max_rows:
            buckets.append(2 * buckets[-1])
        return tuple(b for i, b in enumerate(buckets) if i == 0 or buckets[i - 1] < self.max_rows)

    @property
    def longest_chunk(self) -> int:
        """Length of the longest chunk of a prompt's plan."""
        if self.batch_invariant:
            return self.chunk_lengths[-1]
        return max(self.chunk_lengths[0], min(self.prefill_budget, self.chunk_lengths[-1]))

    @property
    def chunk_shapes(self) -> tuple[tuple[int, int], ...]:
        """Numbers of prompts and lengths of the chunks that prefill programs are compiled for."""
        if self.shapes is not None:
            return self.shapes.chunks
        longest = self.longest_chunk
        lengths = [n for n in self.chunk_lengths if n <= longest]
        counts = (1,) if self.batch_invariant else (1, 4, MAX_SEGMENTS)
        return tuple((count, n) for n in lengths for count in counts if count == 1 or count * n <= longest)

    def budget(self, num_rows: int) -> int:
        """Returns the most tokens of a step's chunks beside a number of rows."""
        if self.batch_invariant or not self.budgets or not num_rows:
            return max(self.prefill_budget, self.chunk_shapes[-1][1])
        return next(most for bucket, most in zip(self.row_buckets, self.budgets, strict=True) if bucket >= num_rows)


class Prefill(NamedTuple):
    """A chunk of each of some prompts, in a program for `shape`, (rows, tokens)."""

    rows: list[Row]
    starts: list[int]
    counts: list[int]
    shape: tuple[int, int]


@dataclasses.dataclass
class Step:
    """What runs next.

    Attributes:
      prefill: chunks of prompts, or None.
      started: rows whose prompts these complete, by their index in the chunk; they get their first tokens.
      copies: pairs of blocks to copy before that.
      decode: rows that are decoded.
      steps: number of decode steps.
      proposals: tokens that may follow rows to decode; if there are any, these are verified in one step.
    """

    prefill: Prefill | None = None
    started: list[tuple[Row, int]] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    decode: list[Row] = dataclasses.field(default_factory=list)
    steps: int = 0
    proposals: dict[Row, np.ndarray] = dataclasses.field(default_factory=dict)

    def note_start(self, now: float) -> None:
        """Notes when prompts began to run."""
        for row in self.prefill.rows if self.prefill is not None else ():
            row.job.start = row.job.start or now


class OutOfBlocksError(Exception):
    """No block is free for a row that runs, and the tokens of a step that was started are not known yet."""


class Scheduler:
    """Queues of rows, and the blocks of the cache.

    Args:
      plan_chunks: returns the first position and padded length of each chunk of a prompt of some tokens.
    """

    def __init__(self, limits: Limits, num_blocks: int, plan_chunks: Callable[[int], list[tuple[int, int]]]):
        self.limits, self.pool, self._plan_chunks = limits, BlockPool(num_blocks), plan_chunks
        self.waiting: deque[Job | Row] = deque()  # requests, and rows that were put back
        self.prefilling: list[Row] = []  # in the order of their admission
        self.running: list[Row] = []
        self._slots = list(range(limits.max_rows - 1, -1, -1))  # free ones
        self._num_admitted = self._num_chunks = self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    @property
    def num_running(self) -> int:
        """Number of rows that have a slot."""
        return self.limits.max_rows - len(self._slots)

    def add(self, job: Job) -> None:
        """Adds a request behind those that wait."""
        job.hashes = block_hashes(job.prompt, self.limits.block, job.request.cache_salt)
        self.waiting.append(job)

    def jobs(self) -> list[Job]:
        """Returns all requests, each once."""
        waiting = [item if isinstance(item, Job) else item.job for item in self.waiting]
        return list(dict.fromkeys([*waiting, *(row.job for row in (*self.prefilling, *self.running))]))

    def remove(self, job: Job) -> None:
        """Ends a request, wherever it is; its blocks are free for the next step."""
        if job in self.waiting:
            self.waiting.remove(job)
        for row in job.rows:
            self.finish(row)

    def finish(self, row: Row) -> None:
        """Ends a row."""
        if row.is_finished:
            return
        row.is_finished = True
        if row in self.waiting:
            self.waiting.remove(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        """Takes a row's slot and blocks."""
        if row in self.prefilling:
            self.prefilling.remove(row)
        if row in self.running:
            self.running.remove(row)
        if row.slot >= 0:
            self._slots.append(row.slot)
            row.slot = -1
        self.pool.release(row.blocks)
        row.blocks, row.num_recorded = [], 0

    # Admission.

    def _admit(self) -> None:
        """Admits requests and rows that were put back, as long as slots and blocks are free."""
        while self.waiting:
            item = self.waiting[0]
            rows = item.rows if isinstance(item, Job) else [item]
            if len(rows) > len(self._slots) or not self._allocate_prompt(rows):
                return
            self.waiting.popleft()
            for row in rows:
                row.slot = self._slots.pop()
                row.admission = self._num_admitted
                self._num_admitted += 1
            rows[0].last_chunk = self._num_chunks
            self.prefilling.append(rows[0])

    def _allocate_prompt(self, rows: list[Row]) -> bool:
        """Gives rows the blocks of their prompt, shared ones where they are cached; returns whether it could.

        The first row computes the prompt. Later ones share its full blocks, and get a last block of their own.
        """
        limits, row, sequence = self.limits, rows[0], rows[0].sequence
        row.hashes = block_hashes(sequence, limits.block, row.job.request.cache_salt, row.job.hashes)
        is_scored = row.job.is_scored and not row.tokens  # each token of its prompt is computed
        shared = [] if is_scored else self.pool.find(row.hashes[: (len(sequence) - 1) // limits.block])
        if limits.batch_invariant:  # the rest must begin where a chunk of the longest length would
            unit = max(1, limits.chunk_lengths[-1] // limits.block)
            shared = shared[: len(shared) // unit * unit]
        num_blocks, num_full = len(sequence) // limits.block + 1, len(sequence) // limits.block
        num_new = num_blocks - len(shared) + (len(rows) - 1) * (num_blocks - num_full)
        reserved = len(self.running)  # a block for each row that runs
        if num_new + reserved > self.pool.num_free - self.pool.num_unused(shared):
            return False
        self.pool.use(shared)
        row.blocks = shared + self.pool.allocate(num_blocks - len(shared))
        for other in rows[1:]:
            other.blocks = self.pool.allocate(num_blocks - num_full)
        row.num_recorded, row.computed = len(shared), len(shared) * limits.block
        row.chunks = self._plan(row)
        row.generated = len(sequence) - len(row.job.prompt)
        if not row.tokens:
            row.job.cached_tokens = row.computed
            self.prefix_queries += len(sequence)
            self.prefix_hits += row.computed
        return True

    # The next step.

    def next_step(self, burst: int, is_settled: bool, proposals: Mapping[Row, np.ndarray] | None = None) -> Step:
        """Returns the next step, and assumes that it is run.

        Args:
          burst: most decode steps if no prompt is computed.
          is_settled: the tokens of all earlier steps are known.
          proposals: tokens that may follow rows that run; is_settled must hold if there are any.

        Raises:
          OutOfBlocksError: a row must be put back, for which is_settled must hold. Nothing has changed.
        """
        may_admit = bool(self.waiting and self._slots)
        is_burst = not (self.prefilling or may_admit or proposals)
        steps = min(burst, self.limits.steps) if is_burst else 1
        self._allocate_for_decode(steps, is_settled)
        step = Step(steps=steps, proposals=self._allocate_for_proposals(proposals or {}))
        self._admit()
        if self.prefilling:
            step.prefill = self._next_prefill()
            self._start(step)
        # What a constraint allows next depends on the token before.
        ready = [row for row in self.running if row.matcher is None or not row.pending]
        step.decode = [row for row in ready if not self._is_complete(row)]
        for row in step.decode:
            row.pending += steps
        return step

    def _is_complete(self, row: Row) -> bool:
        """Returns whether a row's last token has been started."""
        return row.generated + row.pending >= row.job.limit

    def _allocate_for_decode(self, steps: int, is_settled: bool) -> None:
        """Gives rows that run the blocks that they may reach; puts the youngest back if there are too few."""
        for row in list(self.running):
            if row not in self.running or self._is_complete(row):
                continue
            last = len(row.job.prompt) + row.job.limit
            positions = min(row.num_tokens + row.pending + steps - 1, last)
            needed = -(-positions // self.limits.block) - len(row.blocks)
            while needed > self.pool.num_free and row in self.running:
                if not is_settled:
                    raise OutOfBlocksError
                self.put_back(max((*self.prefilling, *self.running), key=lambda row: row.admission))
            if row in self.running and needed > 0:
                row.blocks += self.pool.allocate(needed)

    def _allocate_for_proposals(self, proposals: Mapping[Row, np.ndarray]) -> dict[Row, np.ndarray]:
        """Gives rows the blocks that their proposals may reach; returns what of these the free blocks can hold."""
        held = {}
        for row, tokens in proposals.items():
            if row not in self.running:  # it was put back
                continue
            needed = -(-(row.num_tokens + len(tokens)) // self.limits.block) - len(row.blocks)
            row.blocks += self.pool.allocate(max(0, min(needed, self.pool.num_free)))
            if fitting := len(row.blocks) * self.limits.block - row.num_tokens:
                held[row] = tokens[:fitting]
        return held

    def put_back(self, row: Row) -> None:
        """Takes a row's slot and blocks; it waits before all others, to be computed again."""
        is_first = row in self.prefilling and not row.tokens and len(row.job.rows) > 1
        rows = row.job.rows if is_first else [row]
        for r in rows:
            self._release(r)
            # In batch-invariant mode new tokens are decoded again, because a chunk would give other bits.
            new = [] if self.limits.batch_invariant else r.tokens
            r.sequence = np.array([*r.job.prompt, *new], np.int32)
            r.computed = r.generated = r.pending = 0
            if r.matcher is not None and self.limits.batch_invariant:
                r.matcher = r.job.request.constraint.matcher()
        self.waiting.appendleft(row.job if is_first else row)
        self.num_preemptions += 1

    def _next_prefill(self) -> Prefill:
        """Returns the next chunks: of the row whose turn it is, with others that the same program can serve."""
        budget = self.limits.budget(len(self.running))
        first = self._next_row()
        length = self._chunk_length(first, budget)
        counts = [n for n, t in self.limits.chunk_shapes if t == length and (n == 1 or n * t <= budget)]
        others = [row for row in self.prefilling if row is not first and self._fits(row, length)]
        others = [] if first.job.is_scored else others
        rows = [first, *others][: max(counts, default=1)]
        num_rows = min((n for n in counts if n >= len(rows)), default=1)
        starts = [row.computed for row in rows]
        num_tokens = [min(length, len(row.sequence) - row.computed) for row in rows]
        for row, number in zip(rows, num_tokens, strict=True):
            row.last_chunk = self._num_chunks
            row.computed += number
            row.chunks = [(start, n) for start, n in row.chunks if start >= row.computed]
            if row.is_prefilled:
                self.prefilling.remove(row)
            elif not row.chunks or row.chunks[0][0] != row.computed:
                row.chunks = self._plan(row)
        return Prefill(rows, starts, num_tokens, (num_rows, length))

    def _next_row(self) -> Row:
        """Returns the row whose chunk is next: the one with least left, or the one that waits longest for a chunk."""
        self._num_chunks += 1
        if self._num_chunks % PATIENCE == 0:
            return min(self.prefilling, key=lambda row: row.last_chunk)
        return min(self.prefilling, key=lambda row: len(row.sequence) - row.computed)

    def _plan(self, row: Row) -> list[tuple[int, int]]:
        """Returns the chunks of what is left of a row."""
        return [(start + row.computed, n) for start, n in self._plan_chunks(len(row.sequence) - row.computed)]

    def _chunk_length(self, row: Row, budget: int) -> int:
        """Returns the length of a row's next chunk: that of its plan, or a part of it within the budget."""
        planned = row.chunks[0][1]
        lengths = [n for n in self.limits.chunk_lengths if n <= planned]
        return max(n for n in lengths if n == lengths[0] or (n <= budget and self._is_aligned(row, n)))

    def _is_aligned(self, row: Row, length: int) -> bool:
        """Returns whether a chunk of this length may begin behind what is computed of a row."""
        return row.computed % min(length, self.limits.block) == 0

    def _fits(self, row: Row, length: int) -> bool:
        """Returns whether a row's next chunk, or all that is left of its prompt, fits a chunk of this length."""
        if row.job.is_scored or not self._is_aligned(row, length):
            return False
        return row.chunks[0][1] == length or len(row.sequence) - row.computed <= length

    def _start(self, step: Step) -> None:
        """Moves rows whose prompts are complete to those that run, with the other completions of their requests."""
        assert step.prefill is not None
        for index, row in enumerate(step.prefill.rows):
            self._record(row, row.computed)
            if not row.is_prefilled:
                continue
            is_first = not row.tokens and row.index == 0
            for started in row.job.rows if is_first else [row]:
                if started is not row:
                    self._fork(row, started, step)
                started.pending += 1
                step.started.append((started, index))
                self.running.append(started)

    def _fork(self, row: Row, other: Row, step: Step) -> None:
        """Gives another completion the blocks of the prompt: full ones are shared, the last is copied."""
        num_full = len(row.sequence) // self.limits.block
        self.pool.use(row.blocks[:num_full])
        if len(row.sequence) % self.limits.block:
            step.copies.append((row.blocks[num_full], other.blocks[0]))
        other.blocks = row.blocks[:num_full] + other.blocks
        other.hashes, other.num_recorded, other.computed = list(row.hashes), row.num_recorded, row.computed
        other.sequence, other.generated = row.sequence, 0

    # What the device computed.

    def record_tokens(self, row: Row) -> None:
        """Makes the full blocks known that a row's tokens fill, but for the last, which is not in the cache."""
        known = row.num_tokens - 1
        if self.limits.batch_invariant or known // self.limits.block <= row.num_recorded:
            return
        sequence = np.array([*row.job.prompt, *row.tokens], np.int32)[:known]
        row.hashes = block_hashes(sequence, self.limits.block, row.job.request.cache_salt, row.hashes)
        self._record(row, known)

    def _record(self, row: Row, num_tokens: int) -> None:
        """Makes the row's full blocks known that `num_tokens` tokens fill."""
        if self.limits.batch_invariant:  # chunks of another length have other bits
            longest = self.limits.chunk_lengths[-1]
            num_tokens = num_tokens // longest * longest
        for i in range(row.num_recorded, num_tokens // self.limits.block):
            self.pool.record(row.blocks[i], row.hashes[i])
            row.num_recorded = i + 1


def table_of(rows: Sequence[Row], num_rows: int, width: int) -> np.ndarray:
    """Returns the blocks of rows, padded to (num_rows, width)."""
    table = np.full((num_rows, width), SPARE, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row.blocks)] = row.blocks
    return table
