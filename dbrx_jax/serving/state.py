"""The state of a server, which its routes share."""

import dataclasses
from typing import TYPE_CHECKING

from dbrx_jax.serving.engine_interface import Engine, MakeConstraint
from dbrx_jax.serving.metrics import Metrics
from dbrx_jax.serving.prompts import PromptReader
from dbrx_jax.serving.settings import Settings
from dbrx_jax.serving.workers import Workers

if TYPE_CHECKING:
    from dbrx_jax.text.tokenizer import DbrxTokenizer


@dataclasses.dataclass
class State:
    """The engine, the tokenizer and the settings of a server, and whether it takes requests.

    Attributes:
      make_constraint: makes constraints for structured output; None if there is no such thing.
      draining: no new requests are taken.
      in_flight: requests for completions that are not yet answered.
    """

    engine: Engine
    tokenizer: "DbrxTokenizer"
    settings: Settings
    make_constraint: MakeConstraint | None
    prompts: PromptReader
    workers: Workers
    metrics: Metrics
    draining: bool = False
    in_flight: int = 0

    def unavailable(self) -> str | None:
        """Returns why no requests are taken, or None if they are."""
        if self.engine.error is not None:
            return "the engine has failed, and the server ends"
        return "the server is shutting down" if self.draining else None
