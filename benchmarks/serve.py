"""The command serve: dbrx-jax serve under the announcement's load, beside llama-server and our own static batches."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import roofline
from benchmarks.checkpoints import cache_folder
from benchmarks.compare import Figures
from benchmarks.engines import OURS, Engine, Subject, started
from benchmarks.machine import Machine
from benchmarks.options import Options, random_prompts
from benchmarks.record import BenchmarkError, cpus
from benchmarks.servers import Server, find_llama_server, llama_server, serve, version_of
from benchmarks.users import Served, User, ask, ask_all, make_users
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status

BATCHES = "static batches"
WARM_PROMPTS = (1, 100, 500)  # tokens; each has chunks of another length
QUESTION = 50  # tokens that the second turn of a conversation adds
CHECKED_PROMPT, CHECKED_TOKENS = 12, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Options):
    """Users of an HTTP server who arrive at random, with mixed lengths: the announcement's load, scaled.

    2000 tokens in and 256 out are divided by --shrink, and are means. At rate 1 the mean interval between users is that
    of the command throughput. With --against llama.cpp the peer is its llama-server; static batches of dbrx_jax, formed
    from those who wait, are always measured.
    """

    batch: int = 8
    """Most users that are served together, by each."""
    users: int = 16
    """Number of users."""
    shrink: int = 8
    """Divisor of the announcement's lengths."""
    rates: tuple[float, ...] = (4.0, 1.0, 0.5)
    """Users a second, in multiples of the scaled announcement's."""
    turn: int = 2000
    """Tokens of the first turn of a conversation."""
    prefill_budget: int | None = None
    """Prompt tokens that dbrx-jax serve computes in a step; by default what it measures at its start."""
    llama_server: Path | None = None
    """llama.cpp's server; by default what DBRX_LLAMA_SERVER names."""
    rounds: int = 2

    def _lengths(self) -> tuple[int, int]:
        return max(2, roofline.ANNOUNCED_PROMPT // self.shrink), max(2, roofline.ANNOUNCED_TOKENS // self.shrink)

    def positions(self) -> int:
        prompt, tokens = self._lengths()
        return max(prompt * 3 // 2 + 4 * tokens, self.turn + QUESTION + 1)

    def facts(self) -> dict[str, Any]:
        prompt, tokens = self._lengths()
        return {**super().facts(), "llama_server": None, "prompt": prompt, "tokens": tokens}

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        prompt, tokens = self._lengths()
        interval = roofline.interval(config, machine, self.dtype, prompt, tokens)
        alone = roofline.user_seconds(config, machine, self.dtype, prompt, tokens)
        return {"interval_seconds": interval, "user_seconds": alone}

    def measure(self, config: DbrxConfig, machine: Machine, subjects: list[Subject]) -> dict[str, Any]:
        interval = roofline.interval(config, machine, self.dtype, *self._lengths())
        source, size = subjects[0].source, (self.batch, self.positions())
        result: dict[str, Any] = {"engines": {}}
        with contextlib.ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = (self.folder or cache_folder()) / f"{source.name}-served"
            mine = stack.enter_context(serve(source, folder, self.dtype, *size, self.prefill_budget, logs / "ours"))
            measured: list[Server | Engine] = [mine]
            if self.against == "llama.cpp":
                program = find_llama_server(self.llama_server)
                arguments = program, subjects[1].source, self.dtype, *size, logs / "llama"
                other = stack.enter_context(llama_server(*arguments))
                measured.append(other)
                result["engines"]["llama-server"] = {"llama-server": version_of(program)}
                result["check"] = self._check(config, mine, other)
            batches = stack.enter_context(started(dataclasses.replace(subjects[0], name=BATCHES)))
            result["engines"][OURS] = batches.load()["versions"]
            measured.append(batches)
            for engine in measured:
                print_status(f"Warm-up: {engine.name}")
                self._warm_up(engine, config)
            result["rounds"] = [self._round(number, measured, config, interval) for number in range(self.rounds)]
        return result | {"load_after": round(os.getloadavg()[0] / cpus(), 2)}

    def _warm_up(self, engine: Server | Engine, config: DbrxConfig) -> None:
        """Compiles the programs of static batches; sends a few requests to a server."""
        prompts = random_prompts(config, 0, 1, max(WARM_PROMPTS))
        for length in WARM_PROMPTS:
            self._serve(engine, [User(0.0, prompts[0][:length], 2)])

    def _round(
        self, number: int, engines: Sequence[Server | Engine], config: DbrxConfig, interval: float
    ) -> dict[str, Figures]:
        """Returns the engines' figures, measured in turn: under each rate's load, and of a conversation."""
        figures: dict[str, Figures] = {engine.name: {} for engine in engines}
        for i, rate in enumerate(self.rates):
            seed = 1 + number * len(self.rates) + i
            users = make_users(seed, self.users, interval / rate, *self._lengths(), config.vocab_size)
            for engine in engines:
                print_status(f"Round {number + 1}, rate {rate:g}: {engine.name}")
                found = load_figures(self._serve(engine, users))
                figures[engine.name] |= {f"rate_{rate:g}_{name}": value for name, value in found.items()}
        for engine in engines:
            if isinstance(engine, Server):
                figures[engine.name] |= self._turns(engine, number, config)
        return figures

    def _check(self, config: DbrxConfig, mine: Server, other: Server) -> dict[str, Any]:
        """Compares greedy tokens of the servers, whose vocabularies have the same texts.

        Raises:
          BenchmarkError: the first tokens differ in float32.
        """
        (prompt,) = random_prompts(config, 0, 1, CHECKED_PROMPT)
        texts = [ask(server.port, prompt, CHECKED_TOKENS).text.split(",") for server in (mine, other)]
        agree = sum(a == b for a, b in zip(*(text[:CHECKED_TOKENS] for text in texts), strict=False))
        if self.dtype == "float32" and not agree:
            raise BenchmarkError(f"{other.name}: gives other tokens than {mine.name}: {texts[1]} and {texts[0]}")
        return {"greedy_tokens": f"{agree} of {CHECKED_TOKENS}"}

    def _serve(self, engine: Server | Engine, users: Sequence[User]) -> list[Served]:
        if isinstance(engine, Server):
            return ask_all(engine.port, users)
        reply = engine.ask("batches", users=users, batch=self.batch, positions=self.positions())
        return [Served(user.arrival, events) for user, events in zip(users, reply["events"], strict=True)]

    def _turns(self, server: Server, number: int, config: DbrxConfig) -> Figures:
        """Returns the seconds to the first token of two turns of a conversation; the second adds QUESTION tokens."""
        (conversation,) = random_prompts(config, 1000 + number, 1, self.turn + QUESTION)
        seconds = []
        for length in (self.turn, self.turn + QUESTION):
            begin = time.perf_counter()
            seconds.append(ask(server.port, conversation[:length], 2).events[0][0] - begin)
        return {"first_turn_first_token_seconds": seconds[0], "second_turn_first_token_seconds": seconds[1]}


def load_figures(served: Sequence[Served]) -> Figures:
    """Returns the rate of all users' tokens, and medians and 99th percentiles of what a user waits for."""
    end = max(user.events[-1][0] for user in served)
    firsts = [user.first_token for user in served]
    gaps = [gap for user in served for gap in user.gaps]
    totals = [user.events[-1][0] - user.arrival for user in served]
    kinds = {"first_token": firsts, "between_tokens": gaps, "total": totals}
    return {
        "tokens_per_second": sum(number for user in served for _, number in user.events) / end,
        **{f"{name}_median_seconds": float(np.median(values)) for name, values in kinds.items()},
        **{f"{name}_p99_seconds": float(np.percentile(values, 99)) for name, values in kinds.items()},
    }
