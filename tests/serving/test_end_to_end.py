"""Tests of the server over the engine and the demo: OpenAI's client gets what generate and the model give."""

import contextlib
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest
import uvicorn

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.cli.load import Checkpoint
from dbrx_jax.cli.serve import _constraint_maker
from dbrx_jax.config import DbrxConfig
from dbrx_jax.demo import source_folder
from dbrx_jax.engine.engine import Engine
from dbrx_jax.serving.app import create_app
from dbrx_jax.serving.server import bind, url_of
from tests.serving.test_disconnect import wait_for

pytestmark = pytest.mark.slow  # the engine compiles for a minute
PROMPTS = ("A list is", "The function returns", "import os\n", "x")
TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32")


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    with Engine(model, tokenizer, max_rows=6, cache_gb=0.2, prefill_budget=16, warm_up=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine, tokenizer, settings):
    folder = source_folder()
    make_constraint = _constraint_maker(
        Checkpoint("demo", folder, DbrxConfig.from_file(folder), tokenizer, settings.defaults)
    )
    # A request may wait for a program to be compiled.
    app = create_app(engine, tokenizer, dataclasses.replace(settings, timeout=300.0), make_constraint)
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        bound.listen()
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        yield openai.OpenAI(base_url=f"{url_of(bound)}/v1", api_key="none", max_retries=0, timeout=300)
        server.should_exit = True
        thread.join()


def generated(model, tokenizer, prompt, **options):
    """The text of generate, without the end token."""
    ids = tokenizer.encode(prompt)
    out = model.generate([ids], max_new_tokens=TOKENS, **options)
    return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True) for row in out]


def test_many_clients_get_the_texts_of_generate(client, model, tokenizer):
    expected = [generated(model, tokenizer, prompt)[0] for prompt in PROMPTS]

    def ask(number):
        options = {"model": "dbrx-demo", "prompt": PROMPTS[number % 4], "max_tokens": TOKENS, "temperature": 0}
        if number % 2:
            parts = client.completions.create(**options, stream=True)
            return "".join(part.choices[0].text for part in parts)
        return client.completions.create(**options).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == expected * 4


def test_seeds_give_the_samples_of_generate(client, model, tokenizer):
    answer = client.completions.create(
        model="dbrx-demo", prompt=PROMPTS[0], max_tokens=TOKENS, n=2, seed=5, temperature=0.8, top_p=0.9
    )
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5, "num_return_sequences": 2}
    assert [choice.text for choice in answer.choices] == generated(model, tokenizer, PROMPTS[0], **options)


def test_log_likelihood_as_lm_eval_reads_it(client, model, tokenizer):
    context, continuation = tokenizer.encode("A list is a"), tokenizer.encode(" string, or a tuple of numbers")
    ids = [*context, *continuation]
    logprobs = np.asarray(jax.nn.log_softmax(model([ids])[0], axis=-1))
    expected = [logprobs[i - 1, ids[i]] for i in range(1, len(ids))]
    choice = client.completions.create(
        model="dbrx-demo", prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
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


def test_structured_output(client):
    options = {"model": "dbrx-demo", "messages": [{"role": "user", "content": "Is a list a list?"}]}
    answer = client.chat.completions.create(**options, extra_body={"guided_choice": ["certainly", "never"]})
    assert answer.choices[0].message.content in ("certainly", "never")
    assert answer.choices[0].finish_reason == "stop"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    answer = client.chat.completions.create(**options, response_format=form)
    assert json.loads(answer.choices[0].message.content)["a"] in (True, False)
    with pytest.raises(openai.BadRequestError, match="guided_regex"):
        client.completions.create(model="dbrx-demo", prompt="x", extra_body={"guided_regex": "("})


def test_client_that_goes_away_frees_the_blocks(client, engine):
    stream = client.completions.create(
        model="dbrx-demo", prompt="x", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().free_blocks == engine.stats().blocks
    assert engine.error is None


def test_refusals_of_the_engine_have_the_apis_names(client):
    with pytest.raises(openai.BadRequestError) as info:
        client.completions.create(model="dbrx-demo", prompt="x", extra_body={"stop_token_ids": list(range(500))})
    assert info.value.param == "stop_token_ids"
