"""Middleware that takes requests for completions while the engine runs and the server stays."""

from starlette.types import ASGIApp, Receive, Scope, Send

from dbrx_jax.serving.errors import ApiError
from dbrx_jax.serving.state import State


class Admission:
    """Middleware that counts the requests for completions, and refuses them when the engine has ended or will end."""

    def __init__(self, app: ASGIApp, state: State):
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        if (reason := self._state.unavailable()) is not None:
            headers = {"Retry-After": str(self._state.settings.retry_after)}
            error = ApiError(503, reason, code="service_unavailable", headers=headers)
            return await error.response()(scope, receive, send)
        self._state.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.in_flight -= 1
