"""Tests of what generate --file asks of the engine: seeds, time limits, the end of requests, and few programs."""

import threading

import pytest

from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.request import Request
from dbrx_jax.engine.scheduler import Shapes
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import GenerationConfig
from tests.engine.conftest import cache_gb


def test_seeds_of_completions(engine, model):
    """A sequence gives each completion its own seed, as generate does for rows."""
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.4, "eos_token_id": 400}
    config = GenerationConfig(**options, num_return_sequences=3)
    tokens = [[], [], []]
    for chunk in engine.submit(Request([3, 4, 5], config, seed=[11, 5, 11])):
        tokens[chunk.index] += chunk.tokens
    expected = model.generate([[3, 4, 5]] * 2, seed=[11, 5], **options)[:, 3:].tolist()
    assert tokens == [expected[0], expected[1], expected[0]]
    with pytest.raises(GenerationError, match="seed: expected one for each of 3 completions, got 2"):
        engine.submit(Request([3, 4, 5], config, seed=[1, 2]))


def test_max_time_ends_a_row_with_what_it_has(engine):
    config = GenerationConfig(max_new_tokens=90, eos_token_id=400, max_time=1e-9)
    chunks = list(engine.submit(Request([3, 4, 5], config)))
    assert [chunk.finish_reason for chunk in chunks] == ["length"]
    assert 1 <= len(chunks[0].tokens) < 90


def test_function_is_called_when_a_request_is_done(engine):
    config = GenerationConfig(max_new_tokens=3, eos_token_id=400)
    done = threading.Event()
    generation = engine.submit(Request([3, 4, 5], config))
    generation.call_when_done(done.set)
    assert done.wait(60)
    assert sum(len(chunk.tokens) for chunk in generation) == 3
    late = []
    generation.call_when_done(lambda: late.append(1))
    assert late == [1]


@pytest.mark.slow
def test_shapes_of_a_known_load_are_all_that_is_compiled(model):
    shapes = Shapes((6,), ((1, 16),), (1,))
    with Engine(model, max_rows=5, cache_gb=cache_gb(model, 8), shapes=shapes) as engine:
        config = GenerationConfig(max_new_tokens=5, eos_token_id=400)
        generations = [engine.submit(Request([i, 4, 5], config)) for i in range(9)]
        tokens = [[t for chunk in g for t in chunk.tokens] for g in generations]
        assert engine.stats().compilations_after_warmup == 0
    expected = model.generate([[i, 4, 5] for i in range(9)], max_new_tokens=5, eos_token_id=400)
    assert tokens == expected[:, 3:].tolist()
