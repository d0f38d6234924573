"""The application: routes and middleware over an engine."""

import importlib.metadata
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from dbrx_jax.serving import chat, completions, tokens
from dbrx_jax.serving.access_log import FIELDS, AccessLog
from dbrx_jax.serving.admission import Admission
from dbrx_jax.serving.answer import Json, check_model, respond
from dbrx_jax.serving.auth import SALT, ApiKeys, Hosts
from dbrx_jax.serving.body_limit import BodyLimit
from dbrx_jax.serving.engine_interface import Engine, MakeConstraint
from dbrx_jax.serving.errors import Failures, add_error_handlers
from dbrx_jax.serving.metrics import Metrics
from dbrx_jax.serving.page import page_response
from dbrx_jax.serving.prompts import PromptReader
from dbrx_jax.serving.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from dbrx_jax.serving.settings import Settings
from dbrx_jax.serving.state import State
from dbrx_jax.serving.workers import Workers

if TYPE_CHECKING:
    from dbrx_jax.text.tokenizer import DbrxTokenizer


def create_app(
    engine: Engine,
    tokenizer: "DbrxTokenizer",
    settings: Settings,
    make_constraint: MakeConstraint | None = None,
    write_log: Callable[[str], None] | None = None,
) -> FastAPI:
    """Creates the ASGI application. Its state is `app.state.server`, a :class:`State`.

    Args:
      make_constraint: makes constraints for structured output, which is refused without.
      write_log: called with the lines of the access log.
    """
    metrics = Metrics(engine, settings.model_name)
    workers = Workers(settings.num_workers, settings.max_preparing)
    state = State(engine, tokenizer, settings, make_constraint, PromptReader(tokenizer, settings), workers, metrics)
    # FastAPI's pages of documentation would load scripts from the network.
    app = FastAPI(title="dbrx-jax", version=importlib.metadata.version("dbrx-jax"), docs_url=None, redoc_url=None)
    app.state.server = state
    add_error_handlers(app)
    _add_completions(app, state)
    _add_tokens(app, state)
    _add_operations(app, state)
    # The last is outermost.
    app.add_middleware(Failures, retry_after=settings.retry_after)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(Admission, state=state)
    app.add_middleware(ApiKeys, keys=settings.api_keys)
    app.add_middleware(Hosts, hosts=settings.hosts)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog, write=write_log, metrics=metrics)
    return app


def _add_completions(app: FastAPI, state: State) -> None:
    settings = state.settings

    @app.post("/v1/completions")
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        work = completions.complete(state, body, time.monotonic(), request.scope[FIELDS], request.scope.get(SALT, ""))
        return await respond(request, work, settings)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        work = chat.answer(state, body, time.monotonic(), request.scope[FIELDS], request.scope.get(SALT, ""))
        return await respond(request, work, settings)

    model = {
        "id": settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dbrx-jax",
        "root": settings.model_name,
        "parent": None,
        "max_model_len": settings.max_model_len,
    }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        check_model(name, settings)
        return Json(model)


def _add_tokens(app: FastAPI, state: State) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        return Json(await tokens.tokenize(state, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        return Json(await tokens.detokenize(state, body))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return Json(tokens.tokenizer_info(state))


def _add_operations(app: FastAPI, state: State) -> None:
    @app.get("/health")
    async def health() -> Response:
        reason = state.unavailable()
        content: dict[str, Any] = {"status": "ok"} if reason is None else {"status": reason}
        return Json(content, 200 if reason is None else 503)

    @app.get("/version")
    async def version() -> Response:
        return Json({"version": app.version})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()
