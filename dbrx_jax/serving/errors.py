"""Errors as the API returns them: OpenAI's object, with the status code that its clients expect."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbrx_jax.console import one_line
from dbrx_jax.errors import DbrxError, EngineClosedError, NotFiniteError, QueueFullError, RequestTimeoutError

MAX_MESSAGE = 500  # characters; a message may quote the request
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would send the same work again
SURROGATE = "a text has half of a surrogate pair, which is no character"
logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An error with the status code and the fields of its answer.

    Attributes:
      param: the field of the request that is wrong.
      code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        message = one_line(self.message)
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request that cannot be used."""
    return ApiError(400, message, param, code)


def context_length_error(message: str, param: str) -> ApiError:
    """Returns the error of a prompt and completion that are longer than the model."""
    return ApiError(400, message, param, "context_length_exceeded")


def as_api_error(error: BaseException, retry_after: int = 2) -> ApiError:
    """Returns the answer to an exception of the engine, the tokenizer or the server itself.

    An exception that is nobody's mistake is logged, and its text is not shown.
    """
    retry = {"Retry-After": str(retry_after)}
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=retry)
        case EngineClosedError():
            return ApiError(503, str(error), code="service_unavailable", headers=retry)
        case RequestTimeoutError() | TimeoutError():
            message = str(error) or "the request did not end within its time"
            return ApiError(504, message, code="timeout", headers=NO_RETRY)
        case NotFiniteError():
            return ApiError(500, str(error), code="not_finite", headers=NO_RETRY)
        case DbrxError():
            return bad_request(str(error))
        case UnicodeEncodeError():
            return bad_request(SURROGATE)
        case RecursionError():
            return bad_request("the request is nested too deeply")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log tells why", code="internal_error", headers=NO_RETRY)


class Failures:
    """Middleware that answers exceptions with OpenAI's object."""

    def __init__(self, app: ASGIApp, retry_after: int):
        self._app, self._retry_after = app, retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except Exception as error:
            if is_started:
                raise
            await as_api_error(error, self._retry_after).response()(scope, receive, send)


def add_error_handlers(app: FastAPI) -> None:
    """Makes an application answer bodies and routes that are wrong with OpenAI's object."""

    async def answer_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error, request).response()

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"there is no route {request.method} {request.url.path}", "not_found"
        elif error.status_code == 405:
            message = f"{request.url.path} has no method {request.method}"
        elif error.status_code == 400:  # of FastAPI, for what its JSON parser refuses but as a syntax error
            message = "the body cannot be read as JSON"
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)


def _validation_error(error: RequestValidationError, request: Request) -> ApiError:
    """Returns the first thing that is wrong with a body, with the path of its field."""
    first = error.errors()[0]
    path = [part for part in first["loc"][1:] if not (isinstance(part, str) and _names_a_type(part))]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']}")
    if not path:
        if "json" not in request.headers.get("content-type", ""):
            return bad_request("send a JSON object with the header Content-Type: application/json")
        return bad_request(SURROGATE if first["type"] == "string_unicode" else "the body must be a JSON object")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{name}: {message[:1].lower()}{message[1:]}", str(path[0]))


def _names_a_type(part: str) -> bool:
    """Returns whether a part of pydantic's path is a member of a union rather than a field."""
    return "[" in part or part in ("str", "int", "bool", "float", "Part", "list", "dict", "NamedTool")


def to_json(value: Any) -> str:
    """Returns JSON in one line, without the characters that some clients take for ends of lines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
