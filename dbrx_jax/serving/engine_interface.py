"""The engine as the server sees it: dbrx_jax.engine.Engine, or a stand-in in the tests."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from dbrx_jax.engine.request import Chunk, Request, TokenLogprobs

# Makes the object for Request.constraint from "json_schema", "json_object", "regex" or "choice" and its value.
MakeConstraint = Callable[[str, Any], Any]


class Generation(Protocol):
    """A request that the engine has taken; iterating it yields its chunks, or raises what ended it."""

    @property
    def cached_tokens(self) -> int:
        """Number of the prompt's tokens whose keys and values were in the cache."""

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None:
        """Log-probabilities of the prompt's tokens, if they were asked for; known before the first chunk."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    def cancel(self) -> None:
        """Ends the request and frees its memory; nothing happens if it has ended."""


class Stats(Protocol):
    """Numbers of the engine, now and since its start; free_blocks has those whose contents can be shared."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generation_tokens(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def proposed_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def compilations_after_warmup(self) -> int: ...


class Engine(Protocol):
    """Runs requests together; its methods may be called from any thread."""

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the engine."""

    def submit(self, request: Request) -> Generation:
        """Queues a request and returns at once.

        Raises:
          GenerationError: the request can never run.
          QueueFullError: too many requests wait.
          EngineClosedError: the engine was closed, or it failed.
        """

    def stats(self) -> Stats: ...

    def close(self, drain_seconds: float = 0.0) -> None: ...
