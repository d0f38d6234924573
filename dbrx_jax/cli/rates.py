"""Rates of generation: totals of tokens and seconds, and the progress of a file of prompts."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dbrx_jax.console import LINE_SECONDS, can_redraw, print_status

if TYPE_CHECKING:
    from dbrx_jax.engine.stats import EngineStats
    from dbrx_jax.generation.stream import TokenStream


class Rates:
    """Totals of tokens and seconds over several streams."""

    def __init__(self) -> None:
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self.prefill_tokens = self.decode_tokens = self.num_rows = 0

    def add(self, stream: "TokenStream", num_rows: int) -> None:
        """Adds the first rows of a stream."""
        for name in self.seconds:
            self.seconds[name] += getattr(stream.timings, name)
        self.num_rows += num_rows
        self.prefill_tokens += int(stream.prompt_lengths[:num_rows].sum())
        self.decode_tokens += int((stream.lengths[:num_rows] - 1).sum())  # a row's first token comes out of its prefill

    @property
    def running_seconds(self) -> float:
        return self.seconds["prefill"] + self.seconds["decode"]

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decode."""
        return (self.decode_tokens + self.num_rows) / max(self.running_seconds, 1e-9)

    def summary(self) -> str:
        prefill = self.prefill_tokens / max(self.seconds["prefill"], 1e-9)
        decode = self.decode_tokens / max(self.seconds["decode"], 1e-9)
        return (
            f"prefill {self.prefill_tokens} tokens, {prefill:.0f}/s; "
            f"decode {self.decode_tokens} tokens, {decode:.1f}/s; compiling {self.seconds['compile']:.1f} s"
        )


class EngineRates:
    """Totals of tokens and seconds of an engine, in which prompts and new tokens are computed together.

    Attributes:
      num_rows: completions that are done.
    """

    def __init__(self) -> None:
        self.num_rows, self.running_seconds = 0, 0.0
        self._prompt_tokens = self._new_tokens = 0
        self._compile_seconds, self._begin = 0.0, time.perf_counter()

    def start(self) -> None:
        """Ends the time of compiling."""
        now = time.perf_counter()
        self._compile_seconds, self._begin = now - self._begin, now

    def update(self, num_rows: int, stats: "EngineStats") -> None:
        self.num_rows, self.running_seconds = num_rows, time.perf_counter() - self._begin
        self._prompt_tokens, self._new_tokens = stats.prompt_tokens, stats.generation_tokens

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return self._new_tokens / max(self.running_seconds, 1e-9)

    def summary(self) -> str:
        return (
            f"prompts {self._prompt_tokens} tokens; new {self._new_tokens} tokens, {self.tokens_per_second:.1f}/s; "
            f"compiling {self._compile_seconds:.1f} s"
        )


@contextlib.contextmanager
def row_progress(total: int, rates: Rates | EngineRates, bar: bool) -> Iterator[Callable[[int], None]]:
    """Shows rows, tokens per second and the time left; yields a function of the number of rows that are done.

    Args:
      bar: show a bar if it can be drawn; else lines, about a hundred or one every LINE_SECONDS.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    if not (bar and can_redraw()):
        yield _row_lines(total, rates)
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda done: shown.update(task, completed=done, description=describe(done, total, rates))


def _row_lines(total: int, rates: Rates | EngineRates) -> Callable[[int], None]:
    last_done, last_print = 0, time.monotonic()

    def advance(done: int) -> None:
        nonlocal last_done, last_print
        if done == total and not last_done:  # one batch needs no progress
            return
        if (done - last_done) * 100 >= total or time.monotonic() - last_print >= LINE_SECONDS:
            last_done, last_print = done, time.monotonic()
            print_status(describe(done, total, rates))

    return advance


def describe(done: int, total: int, rates: Rates | EngineRates) -> str:
    """Returns a line such as "80 of 400 rows, 612 tokens/s, 31 s left"."""
    line = f"{done} of {total} rows"
    if rates.num_rows:
        left = rates.running_seconds / rates.num_rows * (total - done)
        line += f", {rates.tokens_per_second:,.0f} tokens/s, {_duration(left)} left"
    return line


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
