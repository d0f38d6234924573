"""What both kinds of completions share: the beginning of an answer, its stream, and its deadline."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dbrx_jax.serving.errors import ApiError, to_json
from dbrx_jax.serving.protocol import Body
from dbrx_jax.serving.settings import Settings
from dbrx_jax.serving.sse import ClientGone, EventStream, until_disconnect

CLIENT_GONE = 499  # nginx's status for a client that closed the connection; for the log
GRACE_SECONDS = 10.0  # beyond the engine's deadline, for a client that reads slowly


class Json(JSONResponse):
    """A JSON response."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def header(kind: str, settings: Settings) -> dict[str, Any]:
    """Returns the fields with which an answer begins.

    Args:
      kind: "text_completion", "chat.completion" or "chat.completion.chunk".
    """
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": settings.model_name,
    }


def check_model(name: str | None, settings: Settings) -> None:
    """Raises ApiError for another model than the server's; no name is the server's."""
    if name not in (None, settings.model_name):
        message = f"there is no model {name!r:.80}; this server has {settings.model_name}"
        raise ApiError(404, message, "model", "model_not_found")


async def respond(request: Request, work: Coroutine[Any, Any, Response], settings: Settings) -> Response:
    """Returns the response that `work` makes, which ends when the client goes away or the deadline passes.

    Raises:
      TimeoutError: the deadline passed.
    """
    try:
        async with asyncio.timeout(_seconds(settings)):
            return await until_disconnect(request.receive, work)
    except ClientGone:
        return Response(status_code=CLIENT_GONE)


async def stream(events: AsyncGenerator[str, None], settings: Settings) -> EventStream:
    """Returns a stream of events when the first of them is there: what fails before has a status code.

    Raises:
      DbrxError: the request failed before its first event.
    """
    return EventStream(await anext(events), events, _seconds(settings))


def _seconds(settings: Settings) -> float | None:
    return None if settings.timeout is None else settings.timeout + GRACE_SECONDS


def usage_events(body: Body) -> tuple[bool, bool]:
    """Returns whether the last event has the usage, and whether every event has it."""
    options = body.stream_options
    return bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
