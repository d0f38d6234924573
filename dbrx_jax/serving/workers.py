"""Threads that tokenise and render, so that the event loop does not wait for them."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dbrx_jax.errors import QueueFullError

T = TypeVar("T")


class Workers:
    """A pool of threads with a bound on its calls.

    Args:
      max_pending: calls that are running or wait.
    """

    def __init__(self, num_threads: int, max_pending: int):
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
        self._max_pending, self._num_pending = max_pending, 0

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Returns what a function returns in one of the threads.

        Raises:
          QueueFullError: too many calls wait.
        """
        if self._num_pending >= self._max_pending:
            raise QueueFullError(f"{self._num_pending} requests are being prepared; try again later")
        self._num_pending += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(functools.partial(function, *arguments))
        # The thread goes on if this task is cancelled, so it counts until it is done.
        future.add_done_callback(lambda _: _call_soon(loop, self._finish))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self) -> None:
        self._num_pending -= 1


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
