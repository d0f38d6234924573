"""Tests of completions: OpenAI's client gets what generate and the model give, and each refusal by its name."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest

from tests.serving.test_disconnect import wait_for

pytestmark = pytest.mark.slow  # the engine compiles for a minute
MODEL = "dbrx-demo"
PROMPTS = ("A list is", "The function returns", "import os\n", "x")
TOKENS = 12


def model_logprobs(model, ids):
    """The model's log-probabilities (T, V) of what follows each token; padding lets few lengths be compiled."""
    padded = [*ids, *[0] * (-len(ids) % 64)]
    return np.asarray(jax.nn.log_softmax(model([padded])[0, : len(ids)], axis=-1))


def test_many_clients_get_the_texts_of_generate(client, generated):
    expected = [generated(prompt, TOKENS)[0] for prompt in PROMPTS]

    def ask(number):
        options = {"model": MODEL, "prompt": PROMPTS[number % 4], "max_tokens": TOKENS, "temperature": 0}
        if number % 2:
            parts = client.completions.create(**options, stream=True)
            return "".join(part.choices[0].text for part in parts)
        return client.completions.create(**options).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == expected * 4


def test_a_list_of_prompts_with_stops(client, generated):
    """Choices are in the order of the prompts, n for each."""
    whole = [generated(prompt, TOKENS)[0] for prompt in PROMPTS]
    stop = whole[0][4:6]
    expected = [text.partition(stop)[0] for text in whole]
    assert len(expected[0]) < len(whole[0])
    options = {"model": MODEL, "prompt": list(PROMPTS), "max_tokens": TOKENS, "temperature": 0, "stop": stop}
    answer = client.completions.create(**options, n=2)
    assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert answer.choices[0].finish_reason == "stop"
    texts, usage = [""] * 4, None
    for part in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            texts[choice.index] += choice.text
        usage = part.usage or usage
    assert texts == expected
    assert 2 * usage.completion_tokens == answer.usage.completion_tokens
    assert usage.prompt_tokens == answer.usage.prompt_tokens


def test_seeds_give_the_samples_of_generate(client, generated):
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=TOKENS, n=2, seed=5, temperature=0.8, top_p=0.9
    )
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5, "num_return_sequences": 2}
    assert [choice.text for choice in answer.choices] == generated(PROMPTS[0], TOKENS, **options)


def test_logprobs_of_new_tokens_are_the_models(client, model, tokenizer):
    """Temperature and penalties change which token is drawn, and not its log-probability."""
    choice = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=TOKENS, logprobs=3, seed=7, temperature=1.5, presence_penalty=1.0
    ).choices[0]
    got, prompt = choice.logprobs, tokenizer.encode(PROMPTS[0])
    names = [tokenizer.token_bytes(token).decode(errors="replace") for token in range(len(tokenizer))]
    ids = [*prompt, *(names.index(name) for name in got.tokens)]
    expected = model_logprobs(model, ids)[len(prompt) - 1 : -1]
    drawn = [expected[i, token] for i, token in enumerate(ids[len(prompt) :])]
    np.testing.assert_allclose(got.token_logprobs, drawn, atol=1e-4)
    assert drawn != expected.max(axis=1).tolist()
    for top, row in zip(got.top_logprobs, expected, strict=True):
        best = {names[token]: row[token] for token in np.argsort(-row)[:3]}
        assert {name: top[name] for name in best} == pytest.approx(best, abs=1e-4)
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(len(got.tokens))]


def test_log_likelihood_as_lm_eval_reads_it(client, model, tokenizer):
    context, continuation = tokenizer.encode("A list is a"), tokenizer.encode(" string, or a tuple of numbers")
    ids = [*context, *continuation]
    logprobs = model_logprobs(model, ids)
    expected = [logprobs[i - 1, ids[i]] for i in range(1, len(ids))]
    choice = client.completions.create(
        model=MODEL, prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    ).choices[0]
    got = choice.logprobs
    assert len(got.token_logprobs) == len(ids) + 1
    np.testing.assert_allclose(got.token_logprobs[1:-1], expected, atol=1e-4)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(got.token_logprobs[1:-1], got.top_logprobs[1:-1], strict=True)
    ]
    assert greedy == [bool(logprobs[i - 1].argmax() == ids[i]) for i in range(1, len(ids))]
    assert 0 < sum(greedy) < len(greedy)


@pytest.mark.parametrize(
    ("options", "kind", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"prompt": [7] * 1000, "max_tokens": 25}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x " * 9999}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"prompt": [2560]}, openai.BadRequestError, "prompt", None),
        ({"temperature": 2.0, "top_p": 0.0}, openai.BadRequestError, "top_p", None),
        ({"n": 9, "max_tokens": 1}, openai.BadRequestError, "n", None),
        ({"extra_body": {"top_kk": 1}}, openai.BadRequestError, "top_kk", None),
        ({"extra_body": {"stop_token_ids": list(range(500))}}, openai.BadRequestError, "stop_token_ids", None),
        ({"extra_body": {"guided_regex": "("}}, openai.BadRequestError, "guided_regex", None),
    ],
)
def test_errors(client, options, kind, param, code):
    with pytest.raises(kind) as info:
        client.completions.create(**{"model": MODEL, "prompt": "x"} | options)
    assert (info.value.param, info.value.code) == (param, code)


def test_stream_that_is_closed_frees_the_blocks(client, engine):
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert_idle(engine)


def test_client_that_waits_no_longer_frees_the_blocks(client, engine):
    options = {"model": MODEL, "prompt": "x", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    before = engine.stats().generation_tokens
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**options)
    assert_idle(engine)
    assert engine.stats().generation_tokens - before < 900


def test_servers_deadline(client, start, engine):
    """It has a status before the first token, and is an error in a stream after it."""
    client.completions.create(model=MODEL, prompt="x", max_tokens=9)  # what is needed is compiled
    client = openai.OpenAI(base_url=f"{start(timeout=0.5)}/v1", api_key="none", max_retries=3)
    options = {"model": MODEL, "prompt": "x", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.InternalServerError) as info:
        client.completions.create(**options)
    assert (info.value.status_code, info.value.code) == (504, "timeout")
    assert_idle(engine)
    stream = client.completions.create(**options, stream=True)
    next(stream)
    with pytest.raises(openai.APIError, match=r"longer than its 0\.5 seconds"):
        list(stream)
    assert_idle(engine)


def assert_idle(engine):
    """Asserts that no row is left, and no block; what runs may first have to be compiled."""
    wait_for(lambda: engine.stats().running == engine.stats().waiting == 0, 60)
    assert engine.stats().free_blocks == engine.stats().blocks
    assert engine.error is None
