"""/v1/completions: continues texts."""

import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from dbrx_jax.engine.request import Chunk, Request
from dbrx_jax.serving import options
from dbrx_jax.serving.answer import Json, check_model, header, stream, usage_events
from dbrx_jax.serving.logprobs import CompletionLogprobs
from dbrx_jax.serving.protocol import CompletionBody
from dbrx_jax.serving.run import Run
from dbrx_jax.serving.sse import DONE, event
from dbrx_jax.serving.state import State

DEFAULT_MAX_TOKENS = 16  # OpenAI's
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def complete(state: State, body: CompletionBody, started: float, log: dict[str, Any], salt: str) -> Response:
    """Answers a request.

    Args:
      salt: of the client, with whom no other shares prefixes.

    Raises:
      ApiError, DbrxError: the request cannot be used, or failed before its first token.
    """
    body.refuse_other_fields()
    check_model(body.model, state.settings)
    run = Run(state, started, log, salt)
    await run.start(functools.partial(_requests, state, body))
    writer = _Writer(state, body, run)
    if body.stream:
        return await stream(writer.events(), state.settings)
    return Json(await writer.whole())


def _requests(state: State, body: CompletionBody) -> list[Request]:
    """Returns the engine's request for each prompt."""
    settings = state.settings
    options.check_bounds(body, settings)
    options.check_top_logprobs("logprobs", body.logprobs, settings)
    prompts = state.prompts.prompts(body.prompt)
    limits = [
        options.token_limit(len(prompt), body.n or 1, body.max_tokens, DEFAULT_MAX_TOKENS, "max_tokens", settings)
        for prompt in prompts
    ]
    # The engine makes one token at least; it is dropped if none is asked for.
    configs = [options.generation_config(body, max(limit, 1), settings) for limit in limits]
    constraint = options.constraint(body, state.make_constraint)
    request = functools.partial(
        Request,
        seed=options.seed(body),
        top_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        constraint=constraint,
        cache_salt=body.cache_salt or "",
        timeout=settings.timeout,
    )
    return [request(prompt=prompt, config=config) for prompt, config in zip(prompts, configs, strict=True)]


class _Writer:
    """Writes the answer to a request from the chunks of its run."""

    def __init__(self, state: State, body: CompletionBody, run: Run):
        self._body, self._run, self._tokenizer = body, run, state.tokenizer
        self._header = header("text_completion", state.settings)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of the choices that have begun
        self._drops_tokens = body.max_tokens == 0

    async def whole(self) -> dict[str, Any]:
        """Returns the answer in one object."""
        num_choices = len(self._run.requests) * (self._body.n or 1)
        choices: list[dict[str, Any]] = [{} for _ in range(num_choices)]
        async with contextlib.aclosing(self._run.chunks()) as chunks:
            async for number, chunk in chunks:
                part = self._choice(number, chunk)
                _append(choices[part["index"]], part)
        return {**self._header, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str, None]:
        """Yields the answer as server-sent events."""
        include_usage, continuous = usage_events(self._body)
        more: dict[str, Any] = {"usage": None} if include_usage else {}
        async with contextlib.aclosing(self._run.chunks()) as chunks:
            async for number, chunk in chunks:
                choice = self._choice(number, chunk)
                if continuous:
                    more = {"usage": self._usage()}
                if choice["text"] or choice["finish_reason"] or (choice["logprobs"] and choice["logprobs"]["tokens"]):
                    yield event({**self._header, "choices": [choice], **more})
        if include_usage:
            yield event({**self._header, "choices": [], "usage": self._usage()})
        yield DONE

    def _choice(self, number: int, chunk: Chunk) -> dict[str, Any]:
        """Returns the part of a choice that a chunk adds."""
        index = number * (self._body.n or 1) + chunk.index
        is_first = index not in self._logprobs
        writer = self._logprobs.setdefault(index, CompletionLogprobs(self._tokenizer))
        prompt = self._run.requests[number].prompt
        text = ""
        logprobs: dict[str, list[Any]] | None = None
        if self._body.logprobs is not None:
            logprobs = {name: [] for name in LISTS}
        if is_first and self._body.echo:
            text = self._tokenizer.decode(prompt)
            if logprobs is not None:
                known = self._run.generations[number].prompt_logprobs or [None] * len(prompt)
                logprobs = writer.prompt(prompt, known)
        if not self._drops_tokens:
            text += chunk.text
            if logprobs is not None:
                new = writer.tokens(chunk.logprobs)
                logprobs = {name: logprobs[name] + new[name] for name in LISTS}
        reason = chunk.finish_reason and ("length" if self._drops_tokens else chunk.finish_reason)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        return self._run.usage(0 if self._drops_tokens else None)


def _append(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds a part of a choice to what came before."""
    if not whole:
        whole |= part
        return
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if part["logprobs"] is not None:
        for name in LISTS:
            whole["logprobs"][name] += part["logprobs"][name]
