"""Generation: what the engine returns for a request, an iterator over its chunks."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

from dbrx_jax.engine.request import Chunk, TokenLogprobs
from dbrx_jax.engine.rows import Job


class Wakes:
    """Wakes what waits in event loops for new chunks: each loop once for the rows of a program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Adds an event, which :meth:`send` sets."""
        with self._lock:
            self._events.setdefault(loop, []).append(event)

    def send(self) -> None:
        """Sets the events that were added."""
        with self._lock:
            events, self._events = self._events, {}
        for loop, of_loop in events.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_set_all, of_loop)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


class Generation:
    """Iterator, plain or asynchronous, over the chunks of a request's completions as they are generated.

    Iteration raises what ended the request before its completions were done: RequestTimeoutError, GenerationError or
    EngineClosedError. A request that was cancelled just ends.
    """

    def __init__(self, prompt_tokens: int, wakes: Wakes):
        self.prompt_tokens = prompt_tokens
        self._wakes = wakes
        self._items: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._cancel: Callable[[Job], None] | None = None
        self._is_over = False
        self._when_done: Callable[[], None] | None = None
        self._is_complete = False

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed, because the cache had them."""
        return 0 if self._job is None else self._job.cached_tokens

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Log-probabilities of the prompt's tokens if they were wanted; the first is None. Complete with a chunk."""
        return self._job.prompt_logprobs if self._job is not None and self._job.is_scored else None

    def attach(self, job: Job, cancel: Callable[[Job], None]) -> None:
        """Connects this with the engine's own record of the request."""
        self._job, self._cancel = job, cancel

    def cancel(self) -> None:
        """Ends the request; its blocks are free for the engine's next step. Callable from any thread."""
        if self._job is not None and self._cancel is not None:
            self._cancel(self._job)

    def put(self, item: Chunk | BaseException | None) -> None:
        """Adds a chunk, or what ends the iteration: an exception, or None. An event loop sees it once woken."""
        with self._lock:
            self._items.put(item)
            self._is_complete = not isinstance(item, Chunk)
            if self._is_complete and self._when_done is not None:
                self._when_done()
            if self._waiter is not None:
                self._wakes.add(*self._waiter)

    def call_when_done(self, function: Callable[[], None]) -> None:
        """Calls a function once iterating will not wait any more: now, or later in the engine's thread."""
        with self._lock:
            self._when_done = function
            if self._is_complete:
                function()

    def _take(self, item: Chunk | BaseException | None) -> Chunk | None:
        """Returns a chunk, or None at the end; raises what ended the request."""
        if isinstance(item, Chunk):
            return item
        self._is_over = True
        if item is not None:
            raise item
        return None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = None if self._is_over else self._take(self._items.get())
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Chunk:
        if self._is_over:
            raise StopAsyncIteration
        with self._lock:
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop(), asyncio.Event()
        event = self._waiter[1]
        while True:
            event.clear()
            try:
                chunk = self._take(self._items.get_nowait())
            except queue.Empty:
                await event.wait()
                continue
            if chunk is None:
                raise StopAsyncIteration
            return chunk
