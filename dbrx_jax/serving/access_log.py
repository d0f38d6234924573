"""Middleware that writes a line of JSON for each request, without its text, and gives it an id."""

import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbrx_jax.serving.metrics import Metrics

FIELDS = "dbrx_jax.log"  # of the scope: a dictionary, to which the routes add
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_PATH = 200  # characters
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")


class AccessLog:
    """Middleware that logs each request when it has been answered.

    Args:
      write: called with each line; None writes none.
      metrics: count the answers.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None] | None, metrics: Metrics):
        self._app, self._write, self._metrics = app, write, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        fields: dict[str, Any] = {}
        scope[FIELDS] = fields
        begin, status = time.monotonic(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = scope.get("route")
            self._metrics.count_response(method, getattr(route, "path", "none"), status)
            if self._write is not None:
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "client": (scope.get("client") or ("",))[0],
                    "method": scope["method"],
                    "path": scope["path"][:MAX_PATH],
                    "status": status,
                    "seconds": round(time.monotonic() - begin, 4),
                    "request_id": request_id,
                    **fields,
                }
                self._write(json.dumps(line))
