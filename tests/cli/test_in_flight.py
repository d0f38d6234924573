"""Tests of items in flight, with an engine that waits: their order, their number, and completions of one prompt."""

import dataclasses
import itertools
import random

import pytest

from dbrx_jax.cli import in_flight
from dbrx_jax.cli.file_run import FileRun
from dbrx_jax.cli.in_flight import _InFlight
from dbrx_jax.cli.options import GenerateOptions
from dbrx_jax.cli.prompts import Item, Row, Survey
from dbrx_jax.cli.rates import EngineRates
from dbrx_jax.engine.request import Chunk
from dbrx_jax.engine.stats import EngineStats
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import GenerationConfig

ROWS = 3


@dataclasses.dataclass
class Generation:
    """A request that is done when the test says so."""

    request: object
    when_done: object = None

    def call_when_done(self, function):
        self.when_done = function

    def __iter__(self):
        for index, seed in enumerate(self.request.seed):
            yield Chunk(index, (self.request.prompt[0],), "a", (), None)
            yield Chunk(index, (seed,), "b", (), "stop")


class Engine:
    """An engine that completes a request each time results are waited for: `choose` says which of those that run."""

    def __init__(self, choose):
        self.running, self.choose, self.most = [], choose, 0

    def submit(self, request):
        if request.prompt == [13]:
            raise GenerationError("row 0: unlucky")
        self.running.append(Generation(request))
        self.most = max(self.most, sum(len(g.request.seed) for g in self.running))
        return self.running[-1]

    def stats(self):
        return EngineStats(*[0] * len(EngineStats._fields))


class Finished:
    """A queue that lets the engine complete a request before it is read."""

    def __init__(self, engine):
        self.engine, self.items = engine, []

    def get(self):
        running = self.engine.running
        running.pop(self.engine.choose(len(running))).when_done()
        return self.items.pop()

    def put(self, item):
        self.items.append(item)

    def empty(self):
        return True


def complete(items, choose, rows=ROWS):
    """Yields results of items, with how many lines of the file were read before."""
    survey = Survey("", 0, 5, frozenset([1]), True, 0, None)
    run = FileRun(GenerateOptions(), None, survey, None, rows, 0, 7, False, EngineRates())
    engine = Engine(choose)
    flight = _InFlight(run, engine)
    flight._finished = Finished(engine)
    read = []
    source = (read.append(item) or item for item in items)
    return engine, ((results, len(read)) for results in flight.results(source))


def item_of(number, copies=1, index=0, error=None, num_bytes=1):
    row = Row(number, {"id": number}, seed=number, num_bytes=num_bytes)
    return Item(row, index, [number], None if error else GenerationConfig(), error, copies)


def test_results_come_in_the_order_of_the_file():
    rng = random.Random(3)
    items = [item_of(i, error="bad" if i % 7 == 2 else None) for i in range(1, 100)]
    engine, results = complete(items, rng.randrange)
    found = list(itertools.chain.from_iterable(r for r, _ in results))
    assert [r["id"] for r in found] == list(range(1, 100))
    assert [r["id"] for r in found if "error" in r] == [i for i in range(1, 100) if i % 7 == 2 or i == 13]
    assert found[12] == {"id": 13, "error": "line 13: unlucky"}
    assert found[0] == {
        "id": 1,
        "completion": "ab",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    assert engine.most == 2 * ROWS  # as many wait as run


@pytest.mark.parametrize(("limit", "num_bytes", "read"), [("AHEAD", 1, ROWS + 5), ("AHEAD_BYTES", 100, 5)])
def test_items_behind_a_slow_one_are_bounded(monkeypatch, limit, num_bytes, read):
    monkeypatch.setattr(in_flight, limit, 5 * num_bytes)
    items = [item_of(i, num_bytes=num_bytes) for i in range(20, 80)]
    _, results = complete(items, lambda count: count - 1)  # the first is last
    first, num_read = next(results)
    assert len(first) == read
    assert num_read == read + 1  # and one that waits
    assert sum(len(r) for r, _ in results) == 60 - read


def test_large_lines_go_one_by_one():
    items = [item_of(i, num_bytes=in_flight.AHEAD_BYTES + 1) for i in range(20, 25)]
    engine, results = complete(items, lambda count: 0)
    assert [len(r) for r, _ in results] == [1] * 5
    assert engine.most == 1


def test_completions_of_a_prompt_are_requests_together():
    items = [item_of(line, 5, index) for line in (20, 21) for index in range(5)]
    engine, results = complete(items, lambda count: count - 1, rows=8)
    found = list(itertools.chain.from_iterable(r for r, _ in results))
    assert [(r["id"], r["index"]) for r in found] == [(line, index) for line in (20, 21) for index in range(5)]
    assert engine.most == 10
