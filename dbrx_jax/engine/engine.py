"""Engine: continuous batching of requests over one paged cache, in a thread of its own."""

import contextlib
import dataclasses
import logging
import threading
from functools import partial
from typing import Literal

import numpy as np

from dbrx_jax.console import announce
from dbrx_jax.engine.channel import Follower, Leader, connect
from dbrx_jax.engine.compilations import count_compilations
from dbrx_jax.engine.generation import Generation, Wakes
from dbrx_jax.engine.job_factory import JobFactory
from dbrx_jax.engine.memory import blocks_for
from dbrx_jax.engine.programs import Programs
from dbrx_jax.engine.request import Request
from dbrx_jax.engine.rows import Job
from dbrx_jax.engine.scheduler import Limits, Shapes
from dbrx_jax.engine.seeds import completion_keys
from dbrx_jax.engine.speculation import Speculation, check_speculation
from dbrx_jax.engine.stats import EngineStats
from dbrx_jax.engine.steps import Steps
from dbrx_jax.engine.warm_up import compile_programs, measure_budgets, measure_verify_costs
from dbrx_jax.errors import EngineClosedError, GenerationError, QueueFullError
from dbrx_jax.memory import is_memory_error
from dbrx_jax.model.cache import block_positions, prefill_chunk_lengths, prefill_chunks
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.sharding.distributed import explain_loss
from dbrx_jax.sharding.partition import BATCH_AXES
from dbrx_jax.text.tokenizer import DbrxTokenizer

STEPS = 8  # most decode steps of one program
LOSS_SECONDS = 2.0  # that a step may go on when a process was lost: it may wait for it for ever
logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once, which come and go at any time.

    Of several processes each makes an engine with the same arguments. That of process 0 takes requests, and the others
    :meth:`follow` it.

    Args:
      model: on one device, or on a mesh of the axes expert and tensor.
      tokenizer: for text and stop strings; None gives tokens alone.
      max_rows: completions that run at once.
      cache_gb: size of the cache on each device; None is what the memory allows.
      cache_dtype: "int8" halves a bfloat16 cache; None is the model's.
      max_waiting: requests that wait.
      max_length: most tokens of prompt and completion; None is the model's limit.
      prefill_budget: most prompt tokens that one step computes. By default the longest chunk if no row runs, else the
        most with which a step takes at most 4 times as long as without, as measured during warm-up, or a chunk that
        takes about as long as the shortest.
      top_logprobs: most probable tokens that a request may ask for with each new one.
      batch_invariant: a request's tokens are bit for bit those that it gets alone.
      speculation: most tokens that one step tries to add to a row beyond one; 0 is off.
      warm_up: compile all programs now, rather than when they are needed first.
      shapes: sizes of the programs, if it is known which the requests need; others are compiled when they are needed.

    Raises:
      GenerationError: a size is out of range, or the mesh has axes for rows.
      MemoryLimitError: the cache does not fit.
      DistributedError: the processes have different arguments, or cannot connect.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: DbrxTokenizer | None = None,
        *,
        max_rows: int = 64,
        cache_gb: float | None = None,
        cache_dtype: Literal["int8"] | None = None,
        max_waiting: int = 1024,
        max_length: int | None = None,
        prefill_budget: int | None = None,
        top_logprobs: int = 20,
        batch_invariant: bool = False,
        speculation: int = 0,
        warm_up: bool = True,
        shapes: Shapes | None = None,
    ):
        partition = model.partition
        if partition.size(*BATCH_AXES) > 1:
            raise GenerationError(
                "mesh: the engine runs on the axes expert and tensor; start one for each group of rows"
            )
        lengths = prefill_chunk_lengths(partition)
        self.limits = Limits(
            max_rows=_whole("max_rows", max_rows),
            max_waiting=_whole("max_waiting", max_waiting),
            positions=min(_whole("max_length", max_length or model.config.max_seq_len), model.config.max_seq_len),
            block=block_positions(partition),
            chunk_lengths=lengths,
            prefill_budget=_whole("prefill_budget", prefill_budget or lengths[-1]),
            steps=STEPS,
            batch_invariant=batch_invariant,
            speculation=check_speculation(speculation, batch_invariant),
            shapes=shapes,
        )
        dtype = model.dtype if cache_dtype is None else np.dtype(cache_dtype)
        options = model.config, model.dtype, self.limits, dtype, cache_gb, prefill_budget, top_logprobs, warm_up
        self._channel = connect(partition, repr(options))
        num_blocks = blocks_for(model, self.limits, dtype, cache_gb)
        programs = Programs(
            model,
            num_blocks,
            dtype,
            slots=self.limits.row_buckets[-1],
            positions=-(-self.limits.positions // self.limits.block) * self.limits.block,
            steps=STEPS,
            batch_invariant=batch_invariant,
            top_logprobs=top_logprobs,
        )
        self._compilations = count_compilations()
        # For numbers of rows, how many times as long as decoding them it takes to verify proposals, as measured.
        self.verify_costs: dict[int, float] = {}
        if warm_up:
            self._warm_up(model, programs, prefill_budget is None and not batch_invariant and shapes is None)
        self._speculation = Speculation(speculation, self.verify_costs)
        self._wakes = Wakes()
        longest = self.limits.longest_chunk
        plan = partial(prefill_chunks, partition=partition, longest=longest)
        self._steps = Steps(programs, self.limits, num_blocks, plan, self._speculation, self._wakes.send)
        sizes = self.limits, self._steps.scheduler.pool.num_blocks, top_logprobs
        self._jobs = JobFactory(model.config, partition, tokenizer, *sizes, self._speculation)
        self._compilations_before = self._compilations()
        self._condition = threading.Condition()
        self._incoming: list[Job] = []
        self._cancelled: list[Job] = []
        self._is_closing = self._is_aborting = self._is_incomplete = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._programs = programs
        if not isinstance(self._channel, Follower):
            self._thread.start()
        if isinstance(self._channel, Leader):
            programs.send = self._channel.send
            self._channel.watch(self._lose)

    def _warm_up(self, model: CausalLM, programs: Programs, measures_budgets: bool) -> None:
        """Compiles the programs, and times those that the scheduler must know the times of."""
        with announce("Compiling the engine's programs, once"):
            compile_programs(model, programs, self.limits)
            completion_keys(0, 1, True)
            if measures_budgets:
                self.limits = dataclasses.replace(self.limits, budgets=measure_budgets(model, programs, self.limits))
            if self.limits.speculation:
                self.verify_costs = measure_verify_costs(model, programs, self.limits)

    # Requests.

    def submit(self, request: Request) -> Generation:
        """Adds a request; returns at once.

        Raises:
          GenerationError: its prompt or options cannot be used, or it would never fit.
          QueueFullError: too many requests wait.
          EngineClosedError: the engine was closed, or failed.
        """
        if isinstance(self._channel, Follower):
            raise EngineClosedError("requests go to process 0; the engines of the others follow it")
        generation = Generation(len(request.prompt), self._wakes)
        job = self._jobs.make_job(request, generation.put)
        generation.attach(job, self._cancel)
        with self._condition:
            if self._is_closing or self.error is not None:
                raise EngineClosedError("the engine takes no more requests")
            waiting = len(self._incoming) + len(self._steps.scheduler.waiting)
            if waiting >= self.limits.max_waiting:
                raise QueueFullError(f"{waiting} requests wait already; try again later")
            self._incoming.append(job)
            self._condition.notify()
        return generation

    def _cancel(self, job: Job) -> None:
        with self._condition:
            self._cancelled.append(job)
            self._condition.notify()

    def stats(self) -> EngineStats:
        """Returns the engine's numbers."""
        scheduler = self._steps.scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting) + len(self._incoming),
            blocks=scheduler.pool.num_blocks,
            free_blocks=scheduler.pool.num_free,
            cached_blocks=scheduler.pool.num_cached,
            prompt_tokens=self._steps.prompt_tokens,
            generation_tokens=self._steps.generation_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.num_preemptions,
            compilations_after_warmup=self._compilations() - self._compilations_before,
            proposed_tokens=self._speculation.proposed,
            accepted_tokens=self._speculation.accepted,
        )

    def close(self, drain_seconds: float = 0.0, step_seconds: float | None = None, is_complete: bool = True) -> None:
        """Takes no more requests, lets those that are here finish for some seconds, and ends the others.

        It waits for the step that runs, at most `step_seconds`. Engines that follow raise LostProcessError unless all
        `is_complete`.
        """
        if isinstance(self._channel, Follower):
            self._channel.close()
            return
        with self._condition:
            self._is_closing, self._is_incomplete = True, not is_complete
            self._condition.notify()
        self._thread.join(drain_seconds)
        with self._condition:
            self._is_aborting = True
            self._condition.notify()
        if step_seconds is not None:
            self._thread.join(step_seconds)
            return
        while self._thread.is_alive() and self.error is None:
            self._thread.join(0.1)
        self._thread.join(LOSS_SECONDS)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(is_complete=error[0] is None)

    # Several processes.

    def follow(self, passes_signals: bool = True) -> None:
        """Runs the steps of process 0 until it closes its engine.

        Args:
          passes_signals: a first SIGTERM or Ctrl-C goes to process 0, as SIGTERM, and does not end this process.

        Raises:
          GenerationError: this is process 0, or the only one.
          LostProcessError: process 0 is gone.
        """
        if not isinstance(self._channel, Follower):
            raise GenerationError("follow: this is the process that takes requests")
        with self._channel.passing_signals() if passes_signals else contextlib.nullcontext():
            self._programs.follow(self._channel.messages())

    def _lose(self, error: BaseException) -> None:
        """Ends the engine when a process was lost."""
        with self._condition:
            self.error = self.error or error
            self._is_closing = self._is_aborting = True
            self._condition.notify()
        self._thread.join(LOSS_SECONDS)
        if self._thread.is_alive():  # it waits for a step that never ends
            self._end_all()

    # The thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._steps.run()
        except BaseException as error:
            if explain_loss(error) is None and not is_memory_error(error):
                logger.exception("the engine failed")
            self.error = self.error or error
        finally:
            self._end_all()

    def _end_all(self) -> None:
        """Ends all requests, and the engines that follow."""
        with self._condition:
            self._is_closing = True
            jobs = [*self._steps.scheduler.jobs(), *self._incoming]
        reason = "the engine failed" if self.error is not None else "the engine was closed"
        for job in jobs:
            error = EngineClosedError(reason)
            error.__cause__ = self.error
            job.put(error)
        self._wakes.send()
        if isinstance(self._channel, Leader):
            self._channel.close(is_complete=self.error is None and not self._is_incomplete)

    def _take_commands(self) -> bool:
        """Takes new requests and cancellations, and waits for them if there is nothing to do; returns False at the end.

        A request that has ended with all its rows leaves no trace.
        """
        with self._condition:
            while not (self._incoming or self._cancelled) and self._steps.is_idle:
                if self._is_closing:
                    return False
                self._condition.wait()
            if self._is_aborting:
                return False
            incoming, self._incoming = self._incoming, []
            cancelled, self._cancelled = self._cancelled, []
            for job in incoming:
                self._steps.add(job)
        for job in cancelled:
            self._steps.end(job, None)
        self._steps.end_late_ones()
        self._wakes.send()
        return True


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GenerationError(f"{name}: expected a whole number above 0, got {value!r:.40}")
    return value
