"""Runs a request's generations: queues them, merges their chunks, and measures them."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from dbrx_jax.engine.request import Chunk, Request
from dbrx_jax.errors import GenerationError
from dbrx_jax.serving.engine_interface import Generation
from dbrx_jax.serving.options import as_bad_request
from dbrx_jax.serving.state import State


class Run:
    """The generations of one HTTP request, an engine request for each of its prompts.

    Args:
      started: when the HTTP request came, of time.monotonic.
      log: fields of its line in the access log; the numbers of tokens are added.
      salt: stands before the salts of the requests.

    Attributes:
      requests: of the engine.
      generations: of these.
    """

    def __init__(self, state: State, started: float, log: dict[str, Any], salt: str):
        self._state, self._started, self._log, self._salt = state, started, log, salt
        self.requests: list[Request] = []
        self.generations: list[Generation] = []
        self.prompt_tokens = self.completion_tokens = 0
        self._is_cancelled, self._lock = False, threading.Lock()

    async def start(self, make_requests: Callable[[], list[Request]]) -> None:
        """Makes the requests and queues them, in a worker: both take time, and the engine's devices may be busy.

        Raises:
          ApiError, DbrxError: the engine did not take one of them; none runs then.
        """
        try:
            await self._state.workers.run(self._submit, make_requests)
        except GenerationError as error:
            self._cancel()
            raise as_bad_request(error) from None
        except BaseException:
            self._cancel()
            raise

    def _submit(self, make_requests: Callable[[], list[Request]]) -> None:
        self.requests = [
            dataclasses.replace(request, cache_salt=self._salt + request.cache_salt) for request in make_requests()
        ]
        self.prompt_tokens = sum(len(request.prompt) for request in self.requests)
        self._log["prompt_tokens"] = self.prompt_tokens
        for request in self.requests:
            if self._is_cancelled:  # the client has gone meanwhile
                return
            generation = self._state.engine.submit(request)
            with self._lock:
                self.generations.append(generation)
                if self._is_cancelled:
                    generation.cancel()

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Yields the index of a prompt and a chunk of its completion; cancels what has not ended if it is closed.

        Raises:
          DbrxError: a request ended with an error.
          TimeoutError: all did not end within the server's time.
        """
        metrics, reason = self._state.metrics, "abort"
        num_unfinished = sum(request.config.num_return_sequences or 1 for request in self.requests)
        last: dict[tuple[int, int], float] = {}
        try:
            async with contextlib.aclosing(_merge(self.generations)) as merged:
                async for number, chunk in merged:
                    self._measure((number, chunk.index), len(chunk.tokens), last)
                    self.completion_tokens += len(chunk.tokens)
                    self._log["completion_tokens"] = self.completion_tokens
                    if chunk.finish_reason is not None:
                        num_unfinished -= 1
                        metrics.count_finished(chunk.finish_reason)
                    yield number, chunk
            metrics.request.observe(time.monotonic() - self._started)
        except Exception:
            reason = "error"
            raise
        finally:
            metrics.count_finished(reason, num_unfinished)
            self._cancel()

    def usage(self, completion_tokens: int | None = None) -> dict[str, Any]:
        """Returns the numbers of tokens until now.

        Args:
          completion_tokens: in place of the number of new tokens.
        """
        new = self.completion_tokens if completion_tokens is None else completion_tokens
        cached = sum(generation.cached_tokens for generation in self.generations)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _measure(self, key: tuple[int, int], num_tokens: int, last: dict[tuple[int, int], float]) -> None:
        """Observes the time until a completion's first token, or from one token to the next."""
        if not num_tokens:
            return
        now = time.monotonic()
        if not last:
            self._state.metrics.first_token.observe(now - self._started)
        elif key in last:
            for _ in range(num_tokens):
                self._state.metrics.inter_token.observe((now - last[key]) / num_tokens)
        last[key] = now

    def _cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            generations = list(self.generations)
        for generation in generations:
            generation.cancel()


async def _merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yields the chunks of several generations as they come, each with its generation's index."""
    if len(generations) == 1:
        async for chunk in generations[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

    async def read(number: int, generation: Generation) -> None:
        try:
            async for chunk in generation:
                queue.put_nowait((number, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(number, generation)) for number, generation in enumerate(generations)]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
