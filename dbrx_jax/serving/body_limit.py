"""Middleware that bounds the bodies of requests."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbrx_jax.serving.errors import ApiError

MAX_DISCARDED = 64 << 20  # bytes that are read of a body that is too long, so that its client reads the answer
DISCARD_SECONDS = 5.0


class BodyLimit:
    """Middleware that reads the body of a request, within bounds, before the application sees the request.

    Args:
      max_bytes: of a body.
      seconds: for reading it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is None:  # the client has gone
            return
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return replay.pop() if replay else await receive()

        await self._app(scope, receive_again, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        too_long = ApiError(
            413, f"the body is over {self._max_bytes} bytes", code="request_too_large", headers={"Connection": "close"}
        )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            await _discard(receive, MAX_DISCARDED)
            raise too_long
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_bytes:
                        if more:
                            await _discard(receive, MAX_DISCARDED - len(body))
                        raise too_long
        except TimeoutError:
            message_text = f"the body did not come within {self._seconds:g} seconds"
            raise ApiError(408, message_text, code="timeout", headers={"Connection": "close"}) from None
        return bytes(body)


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Reads the rest of a body: a client that still sends does not read its answer."""
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            more = True
            while more and max_bytes > 0:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
                max_bytes -= len(message.get("body", b""))
    except TimeoutError:
        pass
