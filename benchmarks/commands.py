"""The commands decode, prefill and throughput: rates against the roofline and against a peer."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import roofline
from benchmarks.compare import Figures
from benchmarks.engines import Engine
from benchmarks.machine import Machine
from benchmarks.options import Options, random_prompts
from dbrx_jax.config import DbrxConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Options):
    """Tokens a second of a batch's decode steps, after each row's first token."""

    batch: int = 1
    """Rows."""
    prompt: int = 64
    """Tokens of each row's prompt."""
    tokens: int = 64
    """New tokens of each row that are timed."""

    def positions(self) -> int:
        return self.prompt + self.tokens + 1

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        bound = roofline.decode_bound(config, machine, self.dtype, self.batch, self.prompt + self.tokens // 2)
        return _bound(bound)

    def ask(self, engine: Engine, number: int, config: DbrxConfig, machine: Machine) -> Figures:
        prompts = random_prompts(config, number, self.batch, self.prompt)
        reply = engine.ask("decode", prompts=prompts, tokens=self.tokens)
        return {"tokens_per_second": self.batch * self.tokens / reply["seconds"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Options):
    """Tokens a second of one row's prompt, to its first new token."""

    prompt: int = 512
    """Tokens of the prompt."""

    def positions(self) -> int:
        return self.prompt + 1

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        return _bound(roofline.prefill_bound(config, machine, self.dtype, self.prompt))

    def ask(self, engine: Engine, number: int, config: DbrxConfig, machine: Machine) -> Figures:
        reply = engine.ask("prefill", prompt=random_prompts(config, number, 1, self.prompt)[0])
        return {"tokens_per_second": self.prompt / reply["seconds"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput(Options):
    """An open loop of users who arrive at a fixed interval: the announcement's load, scaled to machine and model.

    2000 tokens in and 256 out are divided by --shrink. The interval between users is such that serving them
    singly at the roofline would take the same share of the time as on the announcement's node, 0.71.
    """

    batch: int = 4
    """Most users that are served together."""
    users: int = 16
    """Number of users."""
    shrink: int = 8
    """Divisor of the announcement's lengths."""
    rounds: int = 2

    def _lengths(self) -> tuple[int, int]:
        return max(1, roofline.ANNOUNCED_PROMPT // self.shrink), max(1, roofline.ANNOUNCED_TOKENS // self.shrink)

    def positions(self) -> int:
        return sum(self._lengths())

    def facts(self) -> dict[str, Any]:
        prompt, tokens = self._lengths()
        return {**super().facts(), "prompt": prompt, "tokens": tokens}

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        prompt, tokens = self._lengths()
        interval = roofline.interval(config, machine, self.dtype, prompt, tokens)
        alone = roofline.user_seconds(config, machine, self.dtype, prompt, tokens)
        span = (self.users - 1) * interval + alone  # until the last user to arrive has been served
        return {"interval_seconds": interval, "user_seconds": alone, "tokens_per_second": self.users * tokens / span}

    def ask(self, engine: Engine, number: int, config: DbrxConfig, machine: Machine) -> Figures:
        prompt, tokens = self._lengths()
        prompts = random_prompts(config, number, self.users, prompt)
        if number == 0:
            engine.ask("warm", prompts=prompts[: self.batch], tokens=tokens)
            return {}
        interval = roofline.interval(config, machine, self.dtype, prompt, tokens)
        reply = engine.ask("users", prompts=prompts, tokens=tokens, interval=interval, batch=self.batch)
        return {
            "tokens_per_second": self.users * tokens / reply["seconds"],
            "first_token_median_seconds": float(np.median(reply["first"])),
            "first_token_p95_seconds": float(np.percentile(reply["first"], 95)),
            "total_median_seconds": float(np.median(reply["total"])),
            "total_p95_seconds": float(np.percentile(reply["total"], 95)),
        }


def _bound(bound: roofline.Bound) -> dict[str, Any]:
    return {"tokens_per_second": bound.tokens_per_second, "bytes": bound.read, "flops": bound.flops}
