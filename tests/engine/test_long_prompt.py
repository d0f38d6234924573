"""A prompt of 32,000 tokens among short requests: its chunks come one at a time, and no one waits for two of them."""

from typing import NamedTuple

import pytest
from flax import nnx

from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.request import Request
from dbrx_jax.engine.scheduler import PATIENCE
from dbrx_jax.generation_config import GenerationConfig
from tests.engine.conftest import cache_gb
from tests.engine.test_engine import completions, prompt_of

pytestmark = pytest.mark.slow
LONG, BUDGET = 32_000, 512


class Recorded(NamedTuple):
    """The rows of a step; a row is named by the length of its prompt."""

    prefill: list[int]
    num_tokens: list[int]  # of each row of the chunk
    size: int  # of the chunk, with padding
    decode: list[int]
    steps: int


def recorded_steps(engine) -> list[Recorded]:
    """Returns a list to which the steps of an engine are added as they are started."""
    steps, run = [], engine._steps._device.run

    def record_and_run(step):
        rows, _, counts, shape = step.prefill or ([], [], [], (0, 0))
        names = [len(row.job.prompt) for row in rows]
        decode = [len(row.job.prompt) for row in step.decode]
        steps.append(Recorded(names, list(counts), shape[0] * shape[1], decode, step.steps))
        return run(step)

    engine._steps._device.run = record_and_run
    return steps


@pytest.fixture(scope="module")
def model():
    config = DbrxConfig(
        d_model=24, n_heads=3, n_layers=1, max_seq_len=32_768, vocab_size=389,
        ffn_hidden_size=40, moe_num_experts=5, moe_top_k=2, initializer_range=0.3,
    )  # fmt: skip
    model = DbrxForCausalLM(config, rngs=nnx.Rngs(3), dtype="float32")
    model.generation_config = GenerationConfig(eos_token_id=400, pad_token_id=0)
    return model


def generated(model, prompts, max_new_tokens):
    """Returns the new tokens of generate for each prompt."""
    tokens = model.generate(prompts, max_new_tokens=max_new_tokens)
    return tokens[:, max(map(len, prompts)) :].tolist()


def test_long_prompt_holds_up_no_one_longer_than_a_chunk(model):
    config = GenerationConfig(max_new_tokens=400, eos_token_id=400)
    early = [Request(prompt_of(n, n), config) for n in (3, 17, 40)]
    late = [Request(prompt_of(n, n), config.replace({"max_new_tokens": 9})) for n in (21, 100, 700, 1300)]
    long = Request(prompt_of(0, LONG), config.replace({"max_new_tokens": 6}))
    with Engine(model, max_rows=8, cache_gb=cache_gb(model, 300), prefill_budget=BUDGET, warm_up=False) as engine:
        steps = recorded_steps(engine)
        streams = [engine.submit(request) for request in early]
        for stream in streams:
            next(stream)
        started = len(steps)
        streams.append(engine.submit(long))
        while not any(LONG in step.prefill for step in steps):
            next(streams[0])
        arrived = len(steps)
        streams += [engine.submit(request) for request in late]
        results = [completions(stream)[0][0] for stream in streams]
        assert engine.stats().preemptions == 0
    chunks = [step for step in steps if LONG in step.prefill]
    assert sum(step.num_tokens[step.prefill.index(LONG)] for step in chunks) == LONG
    assert all(step.size <= BUDGET for step in steps)
    # Every step with a chunk gives the rows that run a token each, so there is one chunk at most between two tokens.
    for length in (3, 17, 40):
        with_chunk = [i for i, step in enumerate(steps) if step.prefill and i > started]
        last = max(i for i, step in enumerate(steps) if length in step.decode)
        assert all(length in steps[i].decode and steps[i].steps == 1 for i in with_chunk if i <= last)
    # A prompt that comes meanwhile goes first, but for each fourth chunk, and those that were started before it came.
    for length in (21, 100, 700, 1300):
        own = [i for i, step in enumerate(steps) if length in step.prefill]
        others = sum(bool(step.prefill) and LONG not in step.prefill for step in steps[arrived : own[-1] + 1])
        assert sum(LONG in step.prefill for step in steps[arrived : own[-1]]) <= others // (PATIENCE - 1) + 3
    short = [*early, *late]
    wanted = generated(model, [request.prompt for request in short], 400)
    wanted = [*wanted[:3], *generated(model, [long.prompt], 6), *(tokens[:9] for tokens in wanted[3:])]
    for tokens, known in zip(results, wanted, strict=True):
        assert tokens == known[len(known) - len(tokens) :]  # the first of the early ones were taken before
        assert len(tokens) >= 6
