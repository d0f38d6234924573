"""Tests of who may use a server: API keys, host names, origins, and bodies that are too large."""

import time

import pytest

from tests.serving.helpers import complete, refused

ROUTES = (
    *(("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")),
    *(("GET", "/version"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")),
    *(("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/health/"), ("GET", "/HEALTH")),
)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(make_client, engine, method, path):
    client = make_client(api_keys=("one", "twö"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}, {"Authorization": "one"},
                    {"Authorization": "Bearer "}, {"Authorization": b"Bearer \xff"}):  # fmt: skip
        response = client.request(method, path, headers=headers, json={"prompt": "x"} if method == "POST" else None)
        refused(response, 401, "API key", code="invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert not engine.requests


def test_health_and_the_page_need_none(make_client):
    client = make_client(api_keys=("one",))
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code != 401


@pytest.mark.parametrize("header", [b"Bearer one", b"bearer one", "Bearer twö".encode()])
def test_every_key_opens(make_client, header):
    client = make_client(api_keys=("one", "twö"))
    assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_keys_share_nothing_in_the_prefix_cache(make_client, engine):
    """The time to the first token would tell one client what another has asked."""
    client = make_client(api_keys=("one", "two"))
    for key, body in (("one", {}), ("one", {}), ("two", {}), ("one", {"cache_salt": "a"})):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/completions", headers=headers, json={"prompt": "x", **body}).status_code == 200
        message = {"messages": [{"role": "user", "content": "x"}], **body}
        assert client.post("/v1/chat/completions", headers=headers, json=message).status_code == 200
    salts = [request.cache_salt for request in engine.requests]
    assert salts[::2] == salts[1::2]
    assert salts[0] == salts[2]
    assert len({salts[0], salts[4], salts[6]}) == 3
    assert not any(key in salt for key in ("one", "two") for salt in salts)


def test_host_names(make_client):
    """A page whose name means this machine is refused: its requests carry that name."""
    client = make_client(hosts=("localhost", "127.0.0.1", "::1"))
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", ""):
        refused(client.get("/v1/models", headers={"Host": host}), 403, "localhost", code="unknown_host")


def test_cors_is_off_unless_asked(make_client):
    origin = {"Origin": "https://page.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    plain = make_client()
    assert "access-control-allow-origin" not in plain.get("/v1/models", headers=origin).headers
    assert plain.options("/v1/completions", headers=ask).status_code == 405
    client = make_client(allow_origins=("https://page.example",), api_keys=("one",))
    answer = client.options("/v1/completions", headers=ask)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://page.example")
    denied = client.get("/v1/models", headers=origin)
    assert (denied.status_code, denied.headers["access-control-allow-origin"]) == (401, "https://page.example")
    other = client.get("/v1/models", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_bodies_have_a_bound(make_client, engine):
    client = make_client(max_body_bytes=1000)
    complete(client, prompt="x" * 900, max_tokens=1)
    headers = {"Content-Type": "application/json"}
    for content in (b"x" * 1001, (b"x" * 300 for _ in range(4))):
        response = client.post("/v1/completions", content=content, headers=headers)
        refused(response, 413, "1000 bytes", code="request_too_large")
    assert len(engine.requests) == 1


def test_work_before_the_engine_has_a_bound(make_client, monkeypatch):
    client = make_client(max_preparing=0)
    refused(client.post("/tokenize", json={"prompt": "x"}), 429, "prepared", code="rate_limit_exceeded")


def test_long_texts_are_refused_before_they_are_tokenised(make_client, tokenizer, monkeypatch):
    client = make_client(max_body_bytes=1 << 26)

    def encode(text):
        raise AssertionError

    monkeypatch.setattr(tokenizer, "encode", encode)
    begin = time.monotonic()
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 10**6}),
        ("/tokenize", {"prompt": "a" * 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10**6}]}),
    ):
        param = "messages" if "messages" in body else "prompt"
        refused(client.post(path, json=body), 400, "1000000", param=param, code="context_length_exceeded")
    assert time.monotonic() - begin < 5
