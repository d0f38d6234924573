"""Requests to the engine, and what it returns for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dbrx_jax.generation_config import GenerationConfig

FinishReason = Literal["stop", "length"]


class TokenLogprobs(NamedTuple):
    """A token's log-probability under the model, in nats, and the most probable tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token ids and log-probabilities, the most probable first


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of one completion."""

    index: int  # of the completion, 0 … n - 1
    tokens: tuple[int, ...]
    text: str  # whole characters, ending before a stop string; text that may begin one comes with a later chunk
    logprobs: tuple[TokenLogprobs, ...]  # of the tokens, if they were asked for
    finish_reason: FinishReason | None  # of the completion's last chunk


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      prompt: token ids.
      config: options of generation; num_return_sequences is the number of completions.
      seed: completion i samples with fold_in(seed, i); a sequence gives each completion its own seed; None draws one.
      top_logprobs: number of the most probable tokens that are returned with each new token; None returns no
        log-probabilities.
      prompt_logprobs: likewise for each token of the prompt.
      constraint: limits the tokens that may come next, from :mod:`dbrx_jax.engine.constraints`; None is none.
      cache_salt: requests with different salts share no blocks of the prefix cache.
      timeout: seconds after which the request ends with an error; None is no limit.
    """

    prompt: Sequence[int]
    config: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    seed: int | Sequence[int] | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Any = None
    cache_salt: str = ""
    timeout: float | None = None
