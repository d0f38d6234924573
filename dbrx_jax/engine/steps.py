"""Steps: starts the steps of the scheduler on the devices, and delivers the tokens of the one before."""

import time
from collections.abc import Callable

import numpy as np

from dbrx_jax.engine.device import Device, InFlight, Results
from dbrx_jax.engine.programs import Programs
from dbrx_jax.engine.request import FinishReason
from dbrx_jax.engine.rows import Job, Row, make_chunk, token_logprobs
from dbrx_jax.engine.scheduler import Limits, OutOfBlocksError, Scheduler
from dbrx_jax.engine.speculation import Speculation
from dbrx_jax.errors import GenerationError, NotFiniteError, RequestTimeoutError

BURST_SECONDS = 0.01  # that several decode steps in one program may take: a request that arrives waits for them


class Steps:
    """Runs requests step by step. The host works one step behind the devices.

    Args:
      num_blocks: of the cache, with the spare one.
      plan_chunks: as of Scheduler.
      wake: called when requests have new tokens.

    Attributes:
      prompt_tokens, generation_tokens: of the requests so far.
    """

    def __init__(
        self,
        programs: Programs,
        limits: Limits,
        num_blocks: int,
        plan_chunks: Callable[[int], list[tuple[int, int]]],
        speculation: Speculation,
        wake: Callable[[], None],
    ):
        self.scheduler = Scheduler(limits, num_blocks, plan_chunks)
        self._device, self._limits, self._speculation = Device(programs, limits), limits, speculation
        self._wake = wake
        self.prompt_tokens = self.generation_tokens = 0
        self._step_seconds = BURST_SECONDS
        self._in_flight: list[InFlight] = []

    @property
    def is_idle(self) -> bool:
        """True if no request is here and no step runs."""
        return self.scheduler.is_idle and not self._in_flight

    def add(self, job: Job) -> None:
        """Adds a request behind those that wait."""
        self.prompt_tokens += len(job.prompt)
        self.scheduler.add(job)

    def end(self, job: Job, item: BaseException | None) -> None:
        """Ends a request before its completions are done; it gets an error, or None."""
        if not job.is_over:
            job.is_over = True
            self.scheduler.remove(job)
            job.put(item)

    def end_late_ones(self) -> None:
        """Ends requests that take longer than their timeout."""
        for job in self.scheduler.jobs():
            if time.monotonic() > job.deadline:
                self.end(job, RequestTimeoutError(f"the request took longer than its {job.request.timeout:g} seconds"))

    def run(self) -> None:
        """Starts a step on the devices, and then takes the tokens of the one before."""
        most = self._limits.steps
        burst = max(1, min(most, int(BURST_SECONDS / self._step_seconds)))
        proposals = self._speculation.propose(self.scheduler.running)
        is_constrained = any(row.matcher is not None for row in self.scheduler.running)
        if self._in_flight and (proposals or is_constrained):
            self._collect([])  # what may come next depends on the token before
            proposals = self._speculation.propose(self.scheduler.running)
            burst = 1 if is_constrained else burst
        is_busy = bool(self._in_flight)
        try:
            step = self.scheduler.next_step(burst, not self._in_flight, proposals)
        except OutOfBlocksError:
            self._collect([])
            return
        begin = time.perf_counter()
        started = self._device.run(step)
        step.note_start(time.monotonic())
        self._collect(started)
        if step.proposals:
            self._collect([])  # the next step needs to know how many tokens each row got
        elif step.decode and step.prefill is None and is_busy:
            seconds = (time.perf_counter() - begin) / step.steps
            self._step_seconds += 0.2 * (seconds - self._step_seconds)

    def _collect(self, started: list[InFlight]) -> None:
        """Takes the tokens of the steps before, while those just started run."""
        finished, self._in_flight = self._in_flight, started
        for results in finished:
            if not isinstance(results, Results):
                results.record()
                continue
            outputs, counts = results.fetch()
            for i, row in enumerate(results.rows):
                row.pending -= results.steps
                if row.is_finished:
                    continue
                count = int(counts[i])
                top = None if outputs.top_ids is None else (outputs.top_ids[i], outputs.top_logprobs[i])
                self._take_tokens(row, outputs.tokens[i, :count].tolist(), outputs.logprobs[i, :count], top)
                if row in results.proposals:
                    self._speculation.take_result(row, len(results.proposals[row]), count - 1)
            self._wake()

    def _take_tokens(self, row: Row, tokens: list[int], logprobs: np.ndarray, top) -> None:
        """Delivers a row's new tokens, and ends it if they do."""
        job = row.job
        tokens = tokens[: job.limit - row.generated]
        known = min(len(row.tokens) - row.generated, len(tokens))  # computed again, and delivered before
        row.generated += len(tokens)
        is_complete = False
        if row.matcher is not None and tokens:
            try:
                is_complete = row.matcher.follow(tokens)
            except GenerationError as error:
                self.end(job, error)
                return
        if known:
            tokens, logprobs = tokens[known:], logprobs[known:]
        end = row.text.end_of(tokens)
        tokens = tokens[:end]
        is_finite = np.isfinite(logprobs[: len(tokens)])
        if not is_finite.all():
            self._end_damaged(job, len(row.tokens) + int(is_finite.argmin()) + 1)
            return
        row.tokens += tokens
        self.generation_tokens += len(tokens)
        is_full = len(row.tokens) == job.limit or (bool(tokens) and job.is_out_of_time)
        reason: FinishReason | None = "length" if is_full else None
        if end is not None or is_complete:
            reason = "stop"
        wanted, values = job.request.top_logprobs, []
        if wanted is not None:
            for i, token in enumerate(tokens):
                ids, tops = ([], []) if top is None else (top[0][known + i], top[1][known + i])
                values.append(token_logprobs(token, logprobs[i], ids, tops, wanted))
        self.scheduler.record_tokens(row)
        if tokens:
            job.put(make_chunk(row, tokens, values, reason))
        if reason is not None:
            self.scheduler.finish(row)
            if all(r.is_finished for r in job.rows):
                job.is_over = True
                job.put(None)

    def _end_damaged(self, job: Job, number: int) -> None:
        """Ends a request whose logits of new token `number` are not finite, and clears its blocks for the next."""
        blocks = [block for row in job.rows for block in row.blocks]
        own = self.scheduler.pool.of_one_user(blocks)
        self.scheduler.pool.forget(own)
        self.end(
            job,
            NotFiniteError(
                f"the logits of new token {number} are not finite; look for damaged weights with "
                "dbrx-convert inspect --values, or for options that ban every token"
            ),
        )
        self._device.copy([(0, block) for block in own])
