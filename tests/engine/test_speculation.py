"""Tests of speculation: the tokens and log-probabilities of an engine without it, in fewer steps."""

import jax
import numpy as np
import pytest

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.request import Request
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import make_mesh
from tests.conftest import GOLDEN
from tests.engine.conftest import make_engine
from tests.engine.test_engine import OPTIONS, alone, check, completions, prompt_of, random_requests

FEW = {5: 60.0, 9: 60.0, 17: 60.0}  # the rows' only tokens, so that they repeat themselves
SAMPLED = {"do_sample": True, "temperature": 5.0}
REPETITIVE = [
    {},
    {**SAMPLED, "num_return_sequences": 2},
    {"repetition_penalty": 1.2},
    {"eos_token_id": 17, "min_new_tokens": 9},
    {**SAMPLED, "frequency_penalty": 0.3, "bad_words_ids": [[5, 9], [17, 17, 5]]},
    {**SAMPLED, "no_repeat_ngram_size": 4, "eos_token_id": [9], "min_new_tokens": 20},
]


def requests(options, lengths=(3, 21, 30, 145), limit=40):
    """Returns requests whose rows have few different tokens, of limits that differ."""
    base = {"logit_bias": FEW, "eos_token_id": 400}
    configs = [GenerationConfig.from_dict({**base, "max_new_tokens": limit + i, **o}) for i, o in enumerate(options)]
    lengths = [lengths[i % len(lengths)] for i in range(len(configs))]
    return [
        Request(prompt_of(i, n), config, seed=i, top_logprobs=2)
        for i, (n, config) in enumerate(zip(lengths, configs, strict=True))
    ]


def results(engine, some):
    """Runs requests together; returns the chunks of each completion."""
    generations = [engine.submit(request) for request in some]
    return [completions(generation) for generation in generations]


def assert_same(got, expected):
    for some, others in zip(got, expected, strict=True):
        assert len(some) == len(others)
        for (tokens, logprobs, reason), (wanted, wanted_logprobs, wanted_reason) in zip(some, others, strict=True):
            assert (tokens, reason) == (wanted, wanted_reason)
            np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def speculating(model):
    with make_engine(model, speculation=4) as engine:
        yield engine


def counted(engine, run):
    """Runs something; returns the tokens, the steps of rows that made them, and what was proposed and accepted."""
    steps, execute = [], engine._steps._device.run

    def count(step):
        steps.append(len(step.decode) * step.steps)
        return execute(step)

    before, engine._steps._device.run = engine.stats(), count
    try:
        run()
    finally:
        engine._steps._device.run = execute
    after = engine.stats()
    names = ("generation_tokens", "proposed_tokens", "accepted_tokens")
    return sum(steps), *(getattr(after, name) - getattr(before, name) for name in names)


def run_in_turn(engine, some):
    """Runs requests one after another, for which the program for one row is enough."""
    return [completions(engine.submit(request)) for request in some]


@pytest.mark.parametrize("run", [run_in_turn, pytest.param(results, marks=pytest.mark.slow)])
def test_rows_with_different_options_have_the_tokens_of_an_engine_without(engine, speculating, run):
    """One after another, or up to seven rows at once; some end within what was accepted."""
    some = [r for r in requests(REPETITIVE) if run is results or r.config.num_return_sequences != 2]
    got = []
    _, num_tokens, proposed, accepted = counted(speculating, lambda: got.extend(run(speculating, some)))
    assert_same(got, run(engine, some))
    reasons = {reason for rows in got for _, _, reason in rows}
    assert reasons == {"stop", "length"}
    assert num_tokens > 130
    assert 10 < accepted < proposed
    stats = speculating.stats()
    assert stats.free_blocks == stats.blocks
    assert engine.stats().proposed_tokens == 0


def test_row_that_repeats_itself_takes_few_steps(engine, speculating):
    """All tokens are the same; the first steps know nothing to propose."""
    config = GenerationConfig(max_new_tokens=90, logit_bias={5: 99.0}, eos_token_id=400)
    request = Request(prompt_of(3, 9), config, top_logprobs=0)
    got = []
    steps, num_tokens, proposed, accepted = counted(speculating, lambda: got.extend(results(speculating, [request])))
    assert got[0][0][0] == [5] * 90
    assert (num_tokens, proposed) == (90, accepted)
    assert steps < 90 / 2
    assert_same(got, results(engine, [request]))


@pytest.mark.slow
def test_all_options_beside_rows_that_repeat_themselves(speculating, model):
    check(speculating, model, [*random_requests(OPTIONS), *requests(REPETITIVE[:3])])


@pytest.mark.slow
def test_rows_that_are_put_back_go_on_with_the_same_tokens(model, engine):
    """Rows grow to three blocks each, and there are eight; proposals reach over the ends of blocks."""
    some = requests([{}, SAMPLED, {"repetition_penalty": 1.2}, SAMPLED], lengths=(120, 121, 122, 123), limit=150)
    with make_engine(model, speculation=7) as other:
        got = results(other, some)
        stats = other.stats()
    assert_same(got, results(engine, some))
    assert stats.preemptions > 0
    assert stats.free_blocks == 8
    assert stats.accepted_tokens > 50


@pytest.mark.slow
def test_refused_proposals_are_in_no_block_that_is_shared(model, speculating):
    """A second turn uses the block that a row filled while some of its proposals were refused."""
    (request,) = requests([SAMPLED], lengths=(100,), limit=60)
    _, _, proposed, accepted = counted(speculating, lambda: results(speculating, [request]))
    assert proposed > accepted + 5
    ((tokens, _, _),) = results(speculating, [request])[0]
    second = [*request.prompt, *tokens, 7, 8]
    config = GenerationConfig(max_new_tokens=20, eos_token_id=400)
    generation = speculating.submit(Request(second, config, top_logprobs=0))
    ((again, logprobs, _),) = completions(generation)
    assert generation.cached_tokens == 128
    ((wanted, wanted_logprobs),) = alone(model, second, config)
    assert again == wanted
    np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_most_probable_tokens_are_those_of_an_engine_without(engine, speculating):
    (request,) = requests([{}])
    got, expected = ([e for c in some.submit(request) for e in c.logprobs] for some in (speculating, engine))
    assert [e.token for e in got] == [e.token for e in expected]
    for one, other in zip(got, expected, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose([v for _, v in one.top], [v for _, v in other.top], atol=1e-4)


@pytest.mark.slow
def test_text_ends_before_a_stop_string_within_what_was_accepted(demo):
    _, tokenizer = demo
    prompt = tokenizer.encode("one two three. " * 3)
    word = tokenizer.encode(" stop")[0]
    bias = {token: 99.0 for token in (word,)}
    config = GenerationConfig(max_new_tokens=30, logit_bias=bias, eos_token_id=2550)
    with Engine(*demo, max_rows=1, cache_gb=0.1, prefill_budget=16, speculation=5, warm_up=False) as engine:
        text = "".join(chunk.text for chunk in engine.submit(Request(prompt, config)))
        assert engine.stats().accepted_tokens > 10
        stop = tokenizer.decode([word] * 13)
        chunks = list(engine.submit(Request(prompt, config.replace({"stop_strings": [stop]}))))
    assert text == tokenizer.decode([word] * 30)
    assert "".join(chunk.text for chunk in chunks) == ""
    assert chunks[-1].finish_reason == "stop"
    assert sum(len(chunk.tokens) for chunk in chunks) == 13


@pytest.mark.slow
def test_warm_up_compiles_all_programs(model):
    with Engine(model, max_rows=3, cache_gb=0.01, prefill_budget=16, speculation=3) as engine:
        results(engine, requests(REPETITIVE[:3], lengths=(3, 4, 9)))
        assert engine.stats().compilations_after_warmup == 0
        assert engine.verify_costs.keys() == {1, 8}
        assert all(0.1 < cost < 100 for cost in engine.verify_costs.values())


@pytest.mark.slow
def test_engine_on_a_mesh_gives_the_tokens_of_one_device(engine):
    """The tokens of a step that verifies, 4 of each row, are split over two devices."""
    mesh = make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4])
    on_mesh = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", mesh, dtype="float32")
    some = requests(REPETITIVE, lengths=(3, 21, 120, 145))
    with Engine(on_mesh, max_rows=6, cache_gb=1, prefill_budget=128, speculation=3, warm_up=False) as other:
        got = results(other, some)
        assert other.stats().accepted_tokens > 20
    assert_same(got, results(engine, some))


def test_engine_refuses_what_has_other_bits(model):
    with pytest.raises(GenerationError, match="speculation: its steps of several tokens have other bits"):
        Engine(model, speculation=2, batch_invariant=True)
