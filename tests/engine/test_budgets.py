"""Tests of the prompt tokens of a step: the budgets that warm-up measures, and chunks that run alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from dbrx_jax.engine import warm_up
from dbrx_jax.engine.device import ChunkEnd, Device
from dbrx_jax.engine.request import Request
from dbrx_jax.engine.rows import Job, Row
from dbrx_jax.engine.scheduler import Limits, Prefill, Step
from dbrx_jax.generation_config import GenerationConfig

LIMITS = Limits(
    max_rows=8, max_waiting=5, positions=384, block=128, chunk_lengths=(16, 32, 64, 128), prefill_budget=128, steps=8
)


@pytest.mark.parametrize(
    ("chunks", "decodes", "budgets"),
    [
        ([10, 20, 40, 80], [12, 20], (32, 64)),  # 3 times a step without a chunk
        ([10, 20, 40, 80], [1, 30], (16, 128)),  # the shortest is always allowed
        ([80, 99, 101, 200], [1, 30], (32, 32)),  # and those that take about as long
    ],
)
def test_budget_is_three_steps_or_the_time_of_a_short_chunk(monkeypatch, chunks, decodes, budgets):
    times = iter([*chunks, *decodes])
    monkeypatch.setattr(warm_up, "_seconds", lambda run: next(times))
    monkeypatch.setattr(warm_up, "_start_rows", lambda *_: None)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=99))
    programs = SimpleNamespace(positions=384, num_slots=8)
    assert warm_up.measure_budgets(model, programs, LIMITS) == budgets


def test_chunk_with_nothing_behind_it_is_waited_for():
    """Otherwise all chunks of a prompt would start at once, and a request that comes then would wait for them."""
    prompt = np.arange(20, dtype=np.int32)
    job = Job(Request(prompt.tolist(), GenerationConfig()), prompt, 1, lambda chunk: None)
    row = Row(job, 0, None, None, sequence=prompt)
    calls = []
    programs = SimpleNamespace(positions=384, last=np.ones(3), prefill=lambda *arrays: calls.append(arrays))
    device = Device(programs, LIMITS)
    (end,) = device.run(Step(prefill=Prefill([row], [0], [16], (1, 16))))
    assert len(calls) == 1
    assert isinstance(end, ChunkEnd)
    assert end.last is programs.last
    assert device.run(Step()) == []
