"""/v1/chat/completions: answers conversations."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from dbrx_jax.engine.request import Chunk, Request
from dbrx_jax.serving import options
from dbrx_jax.serving.answer import Json, check_model, header, stream, usage_events
from dbrx_jax.serving.errors import bad_request
from dbrx_jax.serving.logprobs import chat_logprobs
from dbrx_jax.serving.protocol import ChatBody
from dbrx_jax.serving.run import Run
from dbrx_jax.serving.sse import DONE, event
from dbrx_jax.serving.state import State
from dbrx_jax.serving.tools import BEGIN, CallParser, ToolParser, forced_call, is_forced, tools_of


async def answer(state: State, body: ChatBody, started: float, log: dict[str, Any], salt: str) -> Response:
    """Answers a request.

    Args:
      salt: of the client, with whom no other shares prefixes.

    Raises:
      ApiError, DbrxError: the request cannot be used, or failed before its first token.
    """
    body.refuse_other_fields()
    check_model(body.model, state.settings)
    run = Run(state, started, log, salt)
    await run.start(lambda: [_request(state, body)])
    writer = _Writer(state, body, run)
    if body.stream:
        return await stream(writer.events(), state.settings)
    return Json(await writer.whole())


def _request(state: State, body: ChatBody) -> Request:
    """Returns the engine's request."""
    settings = state.settings
    options.check_bounds(body, settings)
    options.check_top_logprobs("top_logprobs", body.top_logprobs, settings)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: only with logprobs", "top_logprobs")
    prompt = state.prompts.messages(
        body.messages,
        *options.template_options(body.add_generation_prompt, body.continue_final_message),
        tools=tools_of(body, state.tokenizer),
    )
    if is_forced(body):
        prompt = [*prompt, *state.tokenizer.encode(f"{BEGIN}\n", allowed_special="all")]
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    default = settings.defaults.max_new_tokens
    limit = options.token_limit(len(prompt), body.n or 1, getattr(body, field), default, field, settings)
    return Request(
        prompt=prompt,
        config=options.generation_config(body, limit, settings),
        seed=options.seed(body),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=options.constraint(body, state.make_constraint, forced_call(body)),
        cache_salt=body.cache_salt or "",
        timeout=settings.timeout,
    )


class _Writer:
    """Writes the answer to a request from the chunks of its run."""

    def __init__(self, state: State, body: ChatBody, run: Run):
        self._body, self._run, self._tokenizer = body, run, state.tokenizer
        self._header = header("chat.completion.chunk" if body.stream else "chat.completion", state.settings)
        self._parsers = [_parser(body) for _ in range(body.n or 1)]

    async def whole(self) -> dict[str, Any]:
        """Returns the answer in one object."""
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": {"content": [], "refusal": None} if self._body.logprobs else None,
                "finish_reason": None,
            }
            for index in range(self._body.n or 1)
        ]
        async with contextlib.aclosing(self._run.chunks()) as chunks:
            async for _, chunk in chunks:
                self._append(choices[chunk.index], chunk)
        for choice in choices:
            if "tool_calls" in choice["message"] and not choice["message"]["content"].strip():
                choice["message"]["content"] = None
        return {**self._header, "choices": choices, "usage": self._run.usage()}

    def _append(self, choice: dict[str, Any], chunk: Chunk) -> None:
        """Adds a chunk to a choice."""
        (delta, reason), message = self._delta(chunk), choice["message"]
        message["content"] += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
        choice["finish_reason"] = reason
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] += chat_logprobs(self._tokenizer, chunk.logprobs)

    async def events(self) -> AsyncGenerator[str, None]:
        """Yields the answer as server-sent events."""
        include_usage, continuous = usage_events(self._body)
        begun: set[int] = set()
        async with contextlib.aclosing(self._run.chunks()) as chunks:
            async for _, chunk in chunks:
                usage: dict[str, Any] = {"usage": self._run.usage() if continuous else None}
                if not (include_usage or continuous):
                    usage = {}
                if chunk.index not in begun:
                    begun.add(chunk.index)
                    delta = {"role": "assistant", "content": "", "refusal": None}
                    yield event({**self._header, "choices": [_part(chunk.index, delta)], **usage})
                delta, reason = self._delta(chunk)
                logprobs = None
                if self._body.logprobs and chunk.logprobs:
                    logprobs = {"content": chat_logprobs(self._tokenizer, chunk.logprobs), "refusal": None}
                if delta or logprobs or reason:
                    yield event({**self._header, "choices": [_part(chunk.index, delta, logprobs, reason)], **usage})
        if include_usage:
            yield event({**self._header, "choices": [], "usage": self._run.usage()})
        yield DONE

    def _delta(self, chunk: Chunk) -> tuple[dict[str, Any], str | None]:
        """Returns what a chunk adds to its message, and why the message ends, if it does."""
        parser = self._parsers[chunk.index]
        if parser is None:
            return ({"content": chunk.text} if chunk.text else {}), chunk.finish_reason
        text, calls = parser.push(chunk.text, is_last=chunk.finish_reason is not None)
        reason: str | None = chunk.finish_reason
        if reason == "stop" and parser.num_calls:
            reason = "tool_calls"
        delta: dict[str, Any] = {"content": text} if text else {}
        return delta | ({"tool_calls": calls} if calls else {}), reason


def _parser(body: ChatBody) -> ToolParser | CallParser | None:
    """Returns what finds calls in a choice's text, if there may be any."""
    if is_forced(body):
        return CallParser()
    return ToolParser() if body.tools and body.tool_choice != "none" else None


def _part(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
