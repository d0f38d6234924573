"""Tests of requests that are refused: status codes and OpenAI's error object."""

import asyncio
import json

import pytest

from dbrx_jax.errors import EngineClosedError, GenerationError, NotFiniteError, RequestTimeoutError
from dbrx_jax.serving.errors import Failures
from tests.serving.helpers import complete, events, refused

URL, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]

# Fields of a completion, with the error's param and a part of its message.
BAD = [
    ({"prompt": None}, "prompt", "text, token ids"),
    ({"prompt": 3}, "prompt", "text, token ids"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [""]}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "text, token ids"),
    ({"prompt": ["a", 5]}, "prompt", "text, token ids"),
    ({"prompt": [True]}, "prompt", "text, token ids"),
    ({"prompt": [2560]}, "prompt", "2560"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": ["x"] * 129}, "prompt", "128"),
    ({"max_tokens": -1}, "max_tokens", "0"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"min_tokens": 17}, "min_tokens", "max_tokens"),
    ({"n": 0}, "n", "1"),
    ({"n": 33}, "n", "32"),
    ({"n": True}, "n", "integer"),
    ({"temperature": -0.1}, "temperature", "0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater"),
    ({"top_p": 1.1}, "top_p", "1"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "1"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "2"),
    ({"presence_penalty": -3}, "presence_penalty", "-2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
    ({"seed": 2**63}, "seed", "less"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"stop": "x" * 1001}, "stop", "1000"),
    ({"stop": [3]}, "stop", "string"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"logit_bias": {"2560": 1}}, "logit_bias", "2560"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ({"stop_token_ids": [2560]}, "stop_token_ids", "2560"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"num_beams": 10}, "num_beams", "not supported"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "echo"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"\ud800": 1}, None, "surrogate"),
    ({"guided_regex": "a"}, "guided_regex", "not supported"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
]
BAD_CHAT = [
    ({"messages": []}, "messages", "1"),
    ({"messages": "x"}, "messages", "list"),
    ({"messages": [{"content": "x"}]}, "messages", "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content"),
    ({"messages": USER * 2049}, "messages", "2048"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"chat_template": "x"}, "chat_template", "checkpoint"),
    ({"functions": [{}]}, "functions", "tools"),
    ({"audio": {}}, "audio", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "fragment"), BAD)
def test_bad_fields_of_completions(client, engine, fields, param, fragment):
    refused(client.post(URL, content=json.dumps({"prompt": "x", **fields}), headers=JSON), 400, fragment, param=param)
    assert not engine.requests


@pytest.mark.parametrize(("fields", "param", "fragment"), BAD_CHAT)
def test_bad_fields_of_chat(client, engine, fields, param, fragment):
    refused(client.post(CHAT, json={"messages": USER, **fields}), 400, fragment, param=param)
    assert not engine.requests


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "JSON object"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"3", "JSON object"),
        (b"null", "JSON object"),
        (b'{"prompt": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_bodies_that_are_no_json_object(client, content, fragment):
    refused(client.post(URL, content=content, headers=JSON), 400, fragment)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite(client, value):
    content = f'{{"prompt": "x", "temperature": {value}}}'
    refused(client.post(URL, content=content, headers=JSON), 400, "finite", param="temperature")


def test_another_type_of_content(client):
    """A page of another origin could send it without asking."""
    response = client.post(URL, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    refused(response, 400, "Content-Type: application/json")


def test_fields_without_effect_are_accepted(client, engine):
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"}
    neutral = {
        "best_of": 1,
        "suffix": None,
        "use_beam_search": False,
        "num_beams": 1,
        "skip_special_tokens": True,
        "length_penalty": 1.0,
    }
    complete(client, prompt="x", max_tokens=1, **ignored, **neutral)
    more = {"modalities": ["text"], "parallel_tool_calls": False, "chat_template_kwargs": {}, "tools": None, "n": None}
    complete(client, CHAT, messages=USER, max_tokens=1, **ignored, **more)
    assert len(engine.requests) == 2


def test_other_models_and_routes(client):
    refused(client.post(URL, json={"prompt": "x", "model": "gpt"}), 404, "'gpt'", "dbrx-demo", param="model",
            code="model_not_found")  # fmt: skip
    body = {"messages": USER, "model": "gpt"}
    refused(client.post(CHAT, json=body), 404, param="model", code="model_not_found")
    refused(client.post("/v1/embeddings", json={}), 404, "POST /v1/embeddings", code="not_found")
    refused(client.get(URL), 405, "GET")


def test_long_messages_are_cut(client):
    error = refused(client.post(URL, json={"prompt": "x", "model": "m" * 10**5}), 404, param="model",
                    code="model_not_found")  # fmt: skip
    assert len(error["message"]) < 600


def test_engines_refusals(client, engine, monkeypatch):
    def submit(request):
        raise error

    monkeypatch.setattr(engine, "submit", submit)
    error = GenerationError("it can never run")
    refused(client.post(URL, json={"prompt": "x"}), 400, "it can never run")
    error = EngineClosedError("the engine was closed")
    response = client.post(URL, json={"prompt": "x"})
    assert refused(response, 503, "closed", code="service_unavailable")["type"] == "server_error"
    assert response.headers["retry-after"] == "2"


def test_full_queue_cancels_what_was_queued(client, engine):
    engine.step_seconds = 0.01
    engine.max_waiting = 2
    response = client.post(URL, json={"prompt": ["a", "b", "c", "d", "e"] * 10, "max_tokens": 1000})
    assert refused(response, 429, "wait", code="rate_limit_exceeded")["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "2"
    assert len(engine.cancelled) == len(engine.requests) >= 2
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_before_the_first_token(make_client, engine, stream):
    engine.max_rows = 0  # all requests wait
    engine.step_seconds = 0.01
    client = make_client(timeout=0.1)
    response = client.post(URL, json={"prompt": "x", "stream": stream})
    refused(response, 504, "0.1 seconds", code="timeout")
    assert response.headers["x-should-retry"] == "false"


def test_deadline_of_an_engine_that_hangs(make_client, engine, monkeypatch):
    monkeypatch.setattr("dbrx_jax.serving.answer.GRACE_SECONDS", 0.1)
    monkeypatch.setattr(engine, "max_rows", 0)
    client = make_client(timeout=0.1)
    monkeypatch.setattr(engine, "_changed", type(engine._changed)())  # its thread sleeps on the old one for ever
    refused(client.post(URL, json={"prompt": "x"}), 504, code="timeout")
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestTimeoutError("too slow"), 504, "timeout"),
        (EngineClosedError("gone"), 503, "service_unavailable"),
        (NotFiniteError("NaN"), 500, "not_finite"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
def test_errors_after_the_first_token(client, engine, error, status, code, caplog):
    """An answer in one piece has the status; a stream has begun, and ends with the error."""
    engine.fail = error
    response = client.post(URL, json={"prompt": "x", "max_tokens": 5})
    refused(response, status, code=code)
    assert "secret" not in response.text
    assert ("secret" in caplog.text) == (status == 500 and code == "internal_error")
    for path, body in ((URL, {"prompt": ["x", "y"]}), (CHAT, {"messages": USER})):
        response = client.post(path, json={**body, "max_tokens": 5, "stream": True})
        assert response.status_code == 200
        *_, last, end = response.text.split("\n\n")
        assert end == ""
        assert "[DONE]" not in response.text
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert engine.stats().running == 0


def test_error_of_a_route_is_logged_and_not_shown(client, monkeypatch, caplog):
    def fail(prompt):
        raise KeyError("secret")

    monkeypatch.setattr(client.state.prompts, "prompts", fail)
    refused(client.post(URL, json={"prompt": "x"}), 500, code="internal_error")
    assert "secret" in caplog.text


def test_exception_after_the_answer_began_is_raised():
    """A second answer on the connection would look like a part of the first."""
    sent = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError

    async def send(message):
        sent.append(message)

    with pytest.raises(KeyError):
        asyncio.run(Failures(application, 2)({}, None, send))
    assert len(sent) == 1


def test_streams_end_with_done(client):
    response = client.post(URL, json={"prompt": "x", "max_tokens": 2, "stream": True})
    assert len(events(response.text)) == 2
    assert response.headers["cache-control"] == "no-cache"
