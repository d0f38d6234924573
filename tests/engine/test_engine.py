"""Tests of the engine against generate: the same tokens and log-probabilities, whatever else runs."""

import asyncio
import json
import re
import threading
import time

import jax
import numpy as np
import pytest

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.engine.constraints import Constraints
from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.request import Request
from dbrx_jax.errors import EngineClosedError, GenerationError, QueueFullError, RequestTimeoutError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import make_mesh
from tests.conftest import GOLDEN
from tests.engine.conftest import cache_gb, make_engine


def prompt_of(seed, length, vocabulary=389):
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def completions(generation):
    """Runs a generation to its end; returns tokens, log-probabilities and the reason of each completion."""
    tokens, logprobs, reasons = {}, {}, {}
    for chunk in generation:
        tokens.setdefault(chunk.index, []).extend(chunk.tokens)
        logprobs.setdefault(chunk.index, []).extend(x.logprob for x in chunk.logprobs)
        assert chunk.index not in reasons
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason
    assert reasons.keys() == tokens.keys()
    return [(tokens[i], logprobs[i], reasons[i]) for i in sorted(tokens)]


def alone(model, prompt, config, seed=None, **options):
    """Returns what generate gives for each completion of one prompt."""
    out = model.generate(
        [prompt], generation_config=config, seed=seed, output_logprobs=True, return_dict_in_generate=True, **options
    )
    results = []
    for row, logprobs in zip(out.sequences[:, len(prompt) :], out.logprobs, strict=True):
        count = int(np.isfinite(logprobs).sum())
        results.append((row[:count].tolist(), logprobs[:count]))
    return results


def random_requests(options, lengths=(3, 21, 30, 145)):
    """Returns a request with a random prompt for each of these options."""
    requests = []
    for i, given in enumerate(options):
        limit = {} if "max_length" in given else {"max_new_tokens": 4 + i % 7}
        config = GenerationConfig.from_dict({"eos_token_id": 400, **limit, **given})
        requests.append(Request(prompt_of(i, lengths[i % 4]), config, seed=i, top_logprobs=0))
    return requests


def check(engine, model, requests):
    """Submits requests together; compares each with generate alone."""
    generations = [engine.submit(request) for request in requests]
    for request, generation in zip(requests, generations, strict=True):
        got = completions(generation)
        want = alone(model, request.prompt, request.config, request.seed)
        assert len(got) == len(want)
        for (tokens, logprobs, _), (wanted, wanted_logprobs) in zip(got, want, strict=True):
            assert tokens == wanted, request
            np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)


OPTIONS = [
    {"max_length": 40},
    {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2},
    {
        "repetition_penalty": 1.7,
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "min_new_tokens": 3,
        "eos_token_id": [3, 80, 120, 250],
        "logit_bias": {7: 4.0, 11: -50.0},
        "bad_words_ids": [[330], [247, 198, 4], [9, 2]],
        "suppress_tokens": [3],
        "begin_suppress_tokens": [5, 200],
        "forced_eos_token_id": 17,
        "exponential_decay_length_penalty": (2, 3.0),
    },
    {
        "do_sample": True,
        "top_p": 0.8,
        "min_p": 0.01,
        "typical_p": 0.7,
        "epsilon_cutoff": 0.004,
        "eta_cutoff": 0.01,
        "no_repeat_ngram_size": 2,
        "sequence_bias": {(7, 9): 8.0, (5,): 2.0},
    },
]


@pytest.mark.slow
def test_rows_with_different_options_get_what_generate_gives_them(engine, model):
    """All at once, in few rows and blocks, with prompts of one to three chunks."""
    check(engine, model, random_requests(OPTIONS))
    stats = engine.stats()
    assert stats.free_blocks == stats.blocks == 8
    assert stats.running == stats.waiting == 0


def test_rows_that_are_put_back_go_on_with_the_same_tokens(model):
    """Four rows grow to three blocks each, and there are eight blocks."""
    config = GenerationConfig(max_new_tokens=150, eos_token_id=400)
    sampled = GenerationConfig(max_new_tokens=150, eos_token_id=400, do_sample=True, repetition_penalty=1.3)
    requests = [Request(prompt_of(i, 120 + i), sampled if i % 2 else config, seed=i, top_logprobs=0) for i in range(4)]
    with make_engine(model) as engine:
        check(engine, model, requests)
        assert engine.stats().preemptions > 0
        assert engine.stats().free_blocks == 8


def test_second_turn_computes_only_what_is_new(engine, model):
    config = GenerationConfig(max_new_tokens=20, eos_token_id=400)
    first = prompt_of(50, 300)
    request = Request(first, config, top_logprobs=0)
    generation = engine.submit(request)
    ((tokens, _, _),) = completions(generation)
    assert generation.cached_tokens == 0
    second = [*first, *tokens, *prompt_of(51, 90)]
    generation = engine.submit(Request(second, config, top_logprobs=0))
    ((again, logprobs, _),) = completions(generation)
    assert generation.cached_tokens == 256  # two full blocks
    ((wanted, wanted_logprobs),) = alone(model, second, config)
    assert again == wanted
    np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)
    for salt, cached in (("key", 0), ("", 384)):
        generation = engine.submit(Request(second, config, cache_salt=salt))
        assert completions(generation)[0][0] == wanted
        assert generation.cached_tokens == cached


def test_cancelled_request_frees_its_blocks(engine):
    config = GenerationConfig(max_new_tokens=400, eos_token_id=400)
    generations = [engine.submit(Request(prompt_of(i, 9), config)) for i in range(3)]
    next(generations[1])
    for generation in generations:
        generation.cancel()
    chunks = [list(generation) for generation in generations]
    assert all(chunk.finish_reason is None for some in chunks for chunk in some)
    assert completions(engine.submit(Request([1, 2], GenerationConfig(max_new_tokens=2, eos_token_id=400))))
    assert engine.stats().free_blocks == engine.stats().blocks


def test_request_ends_at_its_time_limit(engine):
    config = GenerationConfig(max_new_tokens=500, eos_token_id=400)
    with pytest.raises(RequestTimeoutError, match=r"^the request took longer than its 0.05 seconds$"):
        list(engine.submit(Request([1, 2, 3], config, timeout=0.05)))


def test_requests_that_can_never_run_are_refused(engine):
    cases = [
        (Request([], GenerationConfig()), "input_ids: expected integers"),
        (Request([1, 389], GenerationConfig()), "input_ids: expected ids from 0 to 388"),
        (Request([1] * 512, GenerationConfig()), "a prompt of 512 tokens fills the model's 512 positions"),
        (
            Request([1, 2], GenerationConfig(max_new_tokens=511)),
            "max_new_tokens: 511 with a prompt of 2 tokens is beyond",
        ),
        (
            Request([1], GenerationConfig(num_return_sequences=7, do_sample=True)),
            "num_return_sequences: expected at most 6",
        ),
        (
            Request([1], GenerationConfig(num_return_sequences=5, do_sample=True, max_new_tokens=200)),
            "beyond the cache of 128 positions for each completion; ask for at most 127 new tokens",
        ),
        (Request([1], GenerationConfig(), top_logprobs=21), "top_logprobs: expected at most 20, got 21"),
        (Request([1], GenerationConfig(stop_strings=("a",))), "stop_strings: needs a tokenizer"),
        (Request([1], GenerationConfig(logit_bias={389: 1.0})), "logit_bias: expected ids below 389"),
        (Request([1], GenerationConfig(bad_words_ids=[[1, 2]] * 65)), "bad_words_ids: expected at most 64 sequences"),
    ]
    for request, message in cases:
        with pytest.raises(GenerationError, match=message):
            engine.submit(request)


@pytest.mark.slow
def test_most_probable_tokens_are_those_of_the_logits(engine, model):
    prompt = prompt_of(3, 10)
    chunks = list(engine.submit(Request(prompt, GenerationConfig(max_new_tokens=3, eos_token_id=400), top_logprobs=4)))
    found = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(found) == 3
    for i, entry in enumerate(found):
        logits = np.asarray(model([prompt + [e.token for e in found[:i]]]))[0, -1]
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        order = np.argsort(-logprobs, kind="stable")[:4]
        assert [token for token, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], logprobs[order], atol=1e-5)
        assert entry.top[0] == (entry.token, entry.logprob)


def test_full_queue_and_closed_engine_refuse_requests(model):
    engine = make_engine(model, max_waiting=2)
    config = GenerationConfig(max_new_tokens=100, eos_token_id=400)
    first = engine.submit(Request([1], config.replace({"num_return_sequences": 6, "do_sample": True})))
    next(first)
    others = [engine.submit(Request([2], config)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already; try again later"):
        engine.submit(Request([3], config))
    engine.close()
    with pytest.raises(EngineClosedError, match="the engine was closed"):
        list(first)
    for generation in others:
        with pytest.raises(EngineClosedError):
            next(generation)
    with pytest.raises(EngineClosedError, match="takes no more requests"):
        engine.submit(Request([4], config))


def test_draining_engine_finishes_what_runs(model):
    engine = make_engine(model)
    generation = engine.submit(Request([1, 2], GenerationConfig(max_new_tokens=9, eos_token_id=400)))
    engine.close(drain_seconds=60)
    assert sum(len(chunk.tokens) for chunk in generation) == 9


def test_failing_engine_ends_its_requests_and_keeps_the_error(model, monkeypatch, caplog):
    engine = make_engine(model)
    monkeypatch.setattr(engine._steps._device, "run", lambda step: 1 / 0)
    with pytest.raises(EngineClosedError, match="the engine failed"):
        list(engine.submit(Request([1], GenerationConfig(max_new_tokens=2))))
    engine._thread.join(10)
    assert isinstance(engine.error, ZeroDivisionError)
    assert "the engine failed" in caplog.text
    with pytest.raises(EngineClosedError):
        engine.submit(Request([1]))


def test_async_iteration_serves_many_tasks(engine, model):
    config = GenerationConfig(max_new_tokens=5, eos_token_id=400)
    prompts = [prompt_of(70 + i, 4) for i in range(9)]

    async def collect(prompt):
        return [token async for chunk in engine.submit(Request(prompt, config)) for token in chunk.tokens]

    async def run():
        return await asyncio.gather(*map(collect, prompts))

    want = [alone(model, prompt, config)[0][0] for prompt in prompts]
    assert asyncio.run(run()) == want


def test_threads_submit_at_once(engine, model):
    config, results = GenerationConfig(max_new_tokens=4, eos_token_id=400), {}

    def work(seed):
        results[seed] = completions(engine.submit(Request(prompt_of(seed, 6), config)))[0][0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {seed: alone(model, prompt_of(seed, 6), config)[0][0] for seed in range(8)}


def test_text_comes_in_whole_characters_and_ends_before_a_stop_string(demo, demo_engine):
    model, tokenizer = demo
    prompt = tokenizer.encode("A list is")
    config = model.generation_config.replace({"max_new_tokens": 40})
    chunks = list(demo_engine.submit(Request(prompt, config)))
    text = "".join(chunk.text for chunk in chunks)
    assert text == tokenizer.decode(model.generate([prompt], max_new_tokens=40)[0, len(prompt) :])
    stop = text[10:14]
    stopped = list(demo_engine.submit(Request(prompt, config.replace({"stop_strings": [stop]}))))
    assert "".join(chunk.text for chunk in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert chunks[-1].finish_reason == "length"


def test_constrained_rows_follow_their_schema_beside_free_ones(demo, demo_engine):
    model, tokenizer = demo
    eos = model.generation_config.eos_token_id
    constraints = Constraints(tokenizer, model.config.vocab_size, eos)
    properties = {"a": {"enum": ["x", "yes"]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    schema = constraints.json_schema(schema)
    digits = constraints.regex("[0-9]{3}-[a-c]{2}")
    prompt = tokenizer.encode("A list is")
    config = model.generation_config.replace({"max_new_tokens": 24})
    sampled = config.replace({"do_sample": True})
    free = demo_engine.submit(Request(prompt, config))
    constrained = [demo_engine.submit(Request(prompt, sampled, seed=i, constraint=digits)) for i in range(3)]
    constrained.append(demo_engine.submit(Request(prompt, sampled, seed=7, constraint=schema)))
    texts = ["".join(chunk.text for chunk in generation) for generation in constrained]
    text = "".join(chunk.text for chunk in free)
    for found in texts[:3]:
        assert re.fullmatch("[0-9]{3}-[a-c]{2}", found), found
    assert json.loads(texts[3])["a"] in ("x", "yes")
    assert text == tokenizer.decode(model.generate([prompt], max_new_tokens=24)[0, len(prompt) :])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 20])
def test_batch_invariant_rows_have_the_bits_of_a_row_alone(model, blocks):
    """With few blocks rows are put back and decoded again, with many the prefix cache serves the last of them."""
    shared = prompt_of(90, 520, 389)[:300]
    requests = []
    for i in range(5):
        options = {"do_sample": True, "temperature": 1.3} if i % 2 else {}
        config = GenerationConfig(max_new_tokens=90 + i, eos_token_id=400, **options)
        requests.append(
            Request(prompt_of(91 + i, 60 + 11 * i) if blocks == 4 else shared, config, seed=i, top_logprobs=0)
        )
    arguments = {"max_rows": 9, "batch_invariant": True, "warm_up": False}
    with Engine(model, cache_gb=cache_gb(model, blocks), **arguments) as engine:
        generations = [engine.submit(request) for request in requests]
        results = [completions(generation)[0] for generation in generations]
        assert (engine.stats().preemptions > 0) == (blocks == 4)
    for request, (tokens, logprobs, _) in zip(requests, results, strict=True):
        ((wanted, wanted_logprobs),) = alone(model, request.prompt, request.config, request.seed, batch_invariant=True)
        assert tokens == wanted
        np.testing.assert_array_equal(np.float32(logprobs), wanted_logprobs)


def test_log_probabilities_of_the_prompt_are_those_of_the_model(engine, model):
    """In three chunks, beside another row, and although the cache has the prompt's first block."""
    prompt, config = prompt_of(120, 290), GenerationConfig(max_new_tokens=2, eos_token_id=400)
    other = engine.submit(Request(prompt, config))
    generation = engine.submit(Request(prompt, config, prompt_logprobs=3))
    assert completions(generation)[0][0] == completions(other)[0][0]
    logits = np.float64(model([prompt]))[0]
    want = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    assert len(generation.prompt_logprobs) == 290
    assert generation.prompt_logprobs[0] is None
    for i, entry in enumerate(generation.prompt_logprobs[1:]):
        assert entry.token == prompt[i + 1]
        np.testing.assert_allclose(entry.logprob, want[i, prompt[i + 1]], atol=1e-4)
        np.testing.assert_allclose([v for _, v in entry.top], np.sort(want[i])[::-1][:3], atol=1e-4)
    assert other.prompt_logprobs is None


@pytest.mark.slow
def test_engine_on_a_mesh_gives_the_tokens_of_one_device(model):
    """Blocks of 128 positions on each of two devices; the vocabulary is split over four."""
    mesh = make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4])
    on_mesh = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", mesh, dtype="float32")
    with Engine(on_mesh, max_rows=6, cache_gb=1, prefill_budget=128, warm_up=False) as engine:
        check(engine, model, random_requests(OPTIONS[:3], lengths=(3, 145, 300, 21)))
        assert engine.limits.block == 256
        generation = engine.submit(Request(prompt_of(2, 300), GenerationConfig(max_new_tokens=3, eos_token_id=400)))
        list(generation)
        assert generation.cached_tokens == 256
    data = make_mesh({"data": 2}, jax.devices()[:2])
    with pytest.raises(GenerationError, match="the engine runs on the axes expert and tensor"):
        Engine(DbrxForCausalLM.from_pretrained(GOLDEN / "fused", data, dtype="float32"))


@pytest.mark.slow
def test_random_arrivals_cancels_and_evictions_leave_every_answer_right(model):
    """300 requests of random lengths and options from four threads, a third of them cancelled, in 8 blocks."""
    rng = np.random.default_rng(0)
    configs = [
        GenerationConfig(max_new_tokens=40, eos_token_id=[400, 7, 90]),
        GenerationConfig(max_new_tokens=150, eos_token_id=400, do_sample=True, top_p=0.9),
        GenerationConfig(max_new_tokens=25, eos_token_id=400, repetition_penalty=1.4),
    ]
    prompts = [prompt_of(1000 + i, int(length)) for i, length in enumerate(rng.integers(1, 250, 25))]
    plans = [(int(rng.integers(25)), int(rng.integers(3)), rng.random() < 0.34, rng.random()) for _ in range(300)]
    answers, errors = {}, []
    with make_engine(model, max_waiting=400) as engine:

        def work(numbers):
            for number in numbers:
                prompt, config, is_cancelled, delay = plans[number]
                generation = engine.submit(Request(prompts[prompt], configs[config], seed=prompt))
                tokens = []
                time.sleep(0.02 * delay)
                for chunk in generation:
                    tokens += chunk.tokens
                    if is_cancelled and len(tokens) > 30 * delay:
                        generation.cancel()
                if is_cancelled:
                    continue
                known = answers.setdefault((prompt, config), tokens)
                if known != tokens:
                    errors.append((number, known, tokens))

        threads = [threading.Thread(target=work, args=(range(i, 300, 12),)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    assert not errors
    assert stats.free_blocks == stats.blocks
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert len(answers) > 50
    for number, config in enumerate(configs):
        chosen = [prompt for prompt, c in answers if c == number]
        out = [alone(model, prompts[prompt], config, prompt)[0][0] for prompt in chosen]
        assert out == [answers[prompt, number] for prompt in chosen]
