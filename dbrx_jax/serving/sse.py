"""Server-sent events, and work that ends when its client goes away."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dbrx_jax.serving.errors import as_api_error, to_json

T = TypeVar("T")
DONE = "data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
)


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def event(value: Any) -> str:
    """Returns an event with a JSON value."""
    return f"data: {to_json(value)}\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled if the client closes the connection.

    Args:
      receive: of a request whose body has been read.

    Raises:
      ClientGone: the client closed the connection.
    """
    main, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({main, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not main.done():
            raise ClientGone
        return main.result()
    finally:
        gone.cancel()
        main.cancel()
        await asyncio.gather(main, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events that come one by one.

    An exception after the first event becomes an event with OpenAI's error object. The generator is closed at the end,
    however it comes.

    Args:
      first: the first event.
      events: the others.
      seconds: after which the connection is closed: a client that does not read would keep it for ever. None is no
        limit.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str, None], seconds: float | None):
        self.status_code, self.background = 200, None
        self.raw_headers = list(HEADERS)
        self._first, self._events, self._seconds = first, events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(self._seconds):
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send(send, self._first)
            try:
                async for text in events:
                    await _send(send, text)
            except Exception as error:
                await _send(send, event(as_api_error(error).body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
