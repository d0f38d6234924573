"""Tests with OpenAI's own client against a server on a socket."""

import openai
import pytest

from tests.serving.fake_engine import FakeEngine

KEY = "a key"
MODEL = "dbrx-demo"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def connect(start_server):
    """A function that starts a server and returns a client; arguments are those of the server."""

    def connect(**changes):
        url, _ = start_server(api_keys=(KEY,), **changes)
        return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    return connect


def test_models(connect):
    client = connect()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "dbrx-jax"


def test_completions(connect, tokenizer, engine):
    client = connect()
    engine.script = tokenizer.encode("wörld 🌍 ok")
    options = {"model": MODEL, "prompt": ["A list", "The"], "max_tokens": len(engine.script), "n": 2, "logprobs": 2}
    whole = client.completions.create(**options, seed=1, echo=True)
    assert [choice.text for choice in whole.choices] == ["A listwörld 🌍 ok"] * 2 + ["Thewörld 🌍 ok"] * 2
    assert whole.choices[3].logprobs.token_logprobs[0] is None
    assert whole.usage.completion_tokens == 4 * len(engine.script)
    texts = [""] * 4
    for part in client.completions.create(**options, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == ["wörld 🌍 ok"] * 4


def test_chat(connect, tokenizer, engine):
    client = connect()
    engine.script = [*tokenizer.encode("Hé 🌍!"), 2553]
    options = {"model": MODEL, "messages": USER, "max_completion_tokens": 50, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == "Hé 🌍!"
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert len(whole.choices[0].logprobs.content) == len(engine.script)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    assert whole.usage.prompt_tokens_details.cached_tokens == 1
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == "Hé 🌍!"
    assert parts[-1].usage == whole.usage
    assert parts[-2].choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=MODEL, messages=USER, max_tokens=50) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hé 🌍!"


def test_vllms_options_in_extra_body(connect, engine):
    extra = {"top_k": 4, "ignore_eos": True, "min_tokens": 2}
    connect().completions.create(model=MODEL, prompt="x", extra_body=extra)
    config = engine.requests[-1].config
    assert (config.top_k, config.eos_token_id, config.min_new_tokens) == (4, (), 2)


def test_errors_have_the_clients_classes(connect, engine, monkeypatch):
    client = connect()

    def create(**options):
        return client.completions.create(**{"model": MODEL, "prompt": "x"} | options)

    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.NotFoundError) as info:
        create(model="gpt")
    assert (info.value.code, info.value.param, info.value.type) == (
        *("model_not_found", "model", "invalid_request_error"),
    )
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(temperature=-1)
    monkeypatch.setattr(engine, "max_waiting", 0)
    with pytest.raises(openai.RateLimitError):
        create()
    monkeypatch.setattr(engine, "max_waiting", 9)
    engine.fail = RuntimeError("x")
    with pytest.raises(openai.APIError, match="the server failed"):
        list(create(stream=True))
    engine.fail = None
    engine.die(RuntimeError("x"))
    with pytest.raises(openai.InternalServerError) as info:
        create()
    assert info.value.status_code == 503


def test_client_tries_again_when_the_queue_is_full(connect, engine):
    client = connect(retry_after=0)
    engine.step_seconds, engine.max_rows, engine.max_waiting = 0.01, 1, 1
    first = client.completions.create(model=MODEL, prompt="x", max_tokens=30, stream=True)
    second = client.completions.create(model=MODEL, prompt="x", max_tokens=3, stream=True, timeout=9)
    next(iter(first))
    answer = client.with_options(max_retries=9).completions.create(model=MODEL, prompt="x", max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert len(list(second)) == 3


def test_deadline_is_not_tried_again(connect, engine):
    engine.step_seconds = 0.02
    client = connect(timeout=0.1).with_options(max_retries=5)
    with pytest.raises(openai.InternalServerError) as info:
        client.completions.create(model=MODEL, prompt="x", max_tokens=500)
    assert (info.value.status_code, info.value.code) == (504, "timeout")
    assert len(engine.requests) == 1


def test_many_at_once(connect, engine, tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    client, ids = connect(), [tokenizer.encode(text) for text in ("A", "list is", "The function")]
    alone = [client.completions.create(model=MODEL, prompt=i, max_tokens=9, seed=3).choices[0].text for i in ids]

    def ask(number):
        answer = client.completions.create(model=MODEL, prompt=ids[number % 3], max_tokens=9, seed=3)
        return answer.choices[0].text == alone[number % 3]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(36)))
    assert isinstance(engine, FakeEngine)
