"""Protocol of the workers: JSON lines on stdin and stdout, with times measured in the worker.

An engine implements loading, logits and generation; the measurements are shared. Imports the standard library only.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple


class Generated(NamedTuple):
    """Greedy tokens of a batch, and times by time.perf_counter."""

    tokens: list[list[int]]  # of each row
    first: float  # when the first token of every row was known
    end: float


class Engine:
    """The interface that each worker implements."""

    def load(self, folder: str, dtype: str) -> dict[str, str]:
        """Reads the checkpoint into memory; returns versions by name."""
        raise NotImplementedError

    def logits(self, prompt: list[int]) -> list[float]:
        """Returns the logits (V,) of the token after the prompt."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        """Generates `tokens` tokens for each row, whatever they are; the prompts are equally long."""
        raise NotImplementedError

    def stream(self, prompts: list[list[int]], tokens: int, rows: int, positions: int) -> Iterator[int]:
        """Likewise for prompts of any lengths; yields the number of each row's new tokens as they come.

        Args:
          rows, positions: of the cache, at least, so that all calls share programs.
        """
        raise NotImplementedError


def run(engine: Engine) -> None:
    """Answers requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries, from Python or C, goes to stderr
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = _HANDLERS[request.pop("do")](engine, **request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"}
        print(json.dumps(reply), file=out, flush=True)


def _load(engine: Engine, folder: str, dtype: str) -> dict[str, Any]:
    with Peak() as peak:
        begin = time.perf_counter()
        versions = engine.load(folder, dtype)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "anonymous_bytes": peak.most - peak.before, "versions": versions}


def _check(engine: Engine, prompt: list[int], tokens: int) -> dict[str, Any]:
    return {"logits": engine.logits(prompt), "greedy": engine.generate([prompt], tokens).tokens[0]}


def _decode(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Times the decode steps after the first token."""
    made = engine.generate(prompts, tokens + 1)
    return {"seconds": made.end - made.first}


def _prefill(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    begin = time.perf_counter()
    return {"seconds": engine.generate([prompt], 1).first - begin}


def _warm(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Runs every batch size once, to compile it."""
    for rows in range(1, len(prompts) + 1):
        engine.generate(prompts[:rows], tokens)
    return {}


def users(engine: Engine, prompts: list[list[int]], tokens: int, interval: float, batch: int) -> dict[str, Any]:
    """Serves an open loop, in which user i arrives at i * interval; returns latencies in seconds.

    Up to `batch` waiting users start together; later ones wait until all of these are done.
    """
    begin, served = time.perf_counter(), 0
    first, total = [], []
    while served < len(prompts):
        time.sleep(max(0.0, begin + served * interval - time.perf_counter()))
        here = int((time.perf_counter() - begin) / interval) + 1
        rows = range(served, min(len(prompts), max(here, served + 1), served + batch))
        made = engine.generate([prompts[i] for i in rows], tokens)
        first += [made.first - begin - i * interval for i in rows]
        total += [made.end - begin - i * interval for i in rows]
        served = rows.stop
    return {"seconds": time.perf_counter() - begin, "first": first, "total": total}


def batches(engine: Engine, users: list[tuple[float, list[int], int]], batch: int, positions: int) -> dict[str, Any]:
    """Serves users as :func:`users` does, with a time of arrival, a prompt and a number of tokens each.

    A batch runs until its last row has its tokens. Returns each user's events: seconds, and a number of new tokens.
    """
    begin, served = time.perf_counter(), 0
    events: list[list[tuple[float, int]]] = [[] for _ in users]
    while served < len(users):
        time.sleep(max(0.0, begin + users[served][0] - time.perf_counter()))
        now = time.perf_counter() - begin
        here = sum(arrival <= now for arrival, _, _ in users)
        rows = range(served, min(max(here, served + 1), served + batch))
        known = 0
        for number in engine.stream([users[i][1] for i in rows], max(users[i][2] for i in rows), batch, positions):
            now = time.perf_counter() - begin
            for i in rows:
                if known < users[i][2]:
                    events[i].append((now, min(number, users[i][2] - known)))
            known += number
        served = rows.stop
    return {"events": events}


_HANDLERS = {
    "load": _load,
    "check": _check,
    "decode": _decode,
    "prefill": _prefill,
    "warm": _warm,
    "users": users,
    "batches": batches,
}


class Peak:
    """Peak anonymous memory (RssAnon) within the block, in bytes; mapped pages of files do not count."""

    def __enter__(self) -> "Peak":
        self.before = self.most = _anonymous()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.most = max(self.most, _anonymous())

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024
