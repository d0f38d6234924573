"""Tests of clients that go away: their requests are cancelled, wherever they are."""

import asyncio
import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from dbrx_jax.serving.sse import EventStream, until_disconnect

CHAT = {"messages": [{"role": "user", "content": "x"}]}
PATHS = {"/v1/completions": {"prompt": ["x", "y"], "n": 2}, "/v1/chat/completions": CHAT}


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def posted(url, path, **body):
    """A connection on which a request has been sent."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(head.encode() + content)
        yield connection


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["running", "waiting"])
def test_client_that_goes_away(start_server, engine, path, stream, state):
    lines = []
    url, server = start_server(lines.append)
    engine.step_seconds = 0.01
    engine.max_rows = 8 if state == "running" else 0
    with posted(url, path, max_tokens=900, stream=stream, **PATHS[path]) as connection:
        expected = len(PATHS[path].get("prompt", "x"))
        wait_for(lambda: getattr(engine.stats(), state) == expected)
        if stream and state == "running":
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
        begin = time.monotonic()
    wait_for(lambda: len(engine.cancelled) == expected)
    assert time.monotonic() - begin < 4
    assert engine.stats().running == engine.stats().waiting == 0
    wait_for(lambda: server.in_flight == 0)
    wait_for(lambda: lines)
    assert json.loads(lines[0])["status"] == (200 if stream and state == "running" else 499)
    rows = expected * PATHS[path].get("n", 1)
    assert f'finished_reason="abort",model_name="dbrx-demo"}} {rows}.0' in server.metrics.text().decode()


def test_client_that_goes_away_while_its_prompt_is_read(start_server, engine, monkeypatch):
    url, server = start_server()
    original = server.prompts.prompts

    def slow(prompt):
        time.sleep(0.3)
        return original(prompt)

    monkeypatch.setattr(server.prompts, "prompts", slow)
    with posted(url, "/v1/completions", prompt="x"):
        wait_for(lambda: server.in_flight == 1)
    wait_for(lambda: server.in_flight == 0)
    time.sleep(0.4)
    assert not engine.requests


def test_client_that_goes_away_while_its_requests_are_queued(start_server, engine, monkeypatch):
    url, server = start_server()
    engine.step_seconds = 0.01
    original = engine.submit

    def slow(request):
        time.sleep(0.2)
        return original(request)

    monkeypatch.setattr(engine, "submit", slow)
    with posted(url, "/v1/completions", prompt=["x", "y", "z"], max_tokens=900):
        wait_for(lambda: engine.requests)
    wait_for(lambda: server.in_flight == 0)
    wait_for(lambda: len(engine.requests) == len(engine.cancelled) == 2)
    assert engine.stats().running == engine.stats().waiting == 0


def test_client_that_sends_half_a_body(start_server, engine):
    url, server = start_server()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: server.in_flight == 1)
    wait_for(lambda: server.in_flight == 0)


def test_client_that_never_sends_its_body(start_server):
    url, server = start_server(body_seconds=0.1)
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        wait_for(lambda: server.in_flight == 0)


def test_client_that_never_reads(start_server, engine, monkeypatch):
    """Its connection is closed after the deadline."""
    monkeypatch.setattr("dbrx_jax.serving.answer.GRACE_SECONDS", 0.2)
    url, server = start_server(timeout=1.0, max_top_logprobs=1000)
    engine.step_seconds = 0.0
    body = {"prompt": "x", "max_tokens": 1000, "logprobs": 1000, "stream": True, "ignore_eos": True}
    parts, content = urlsplit(url), json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        connection.connect((parts.hostname, parts.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        connection.sendall(head.encode() + f"{len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: server.in_flight == 1)
        wait_for(lambda: server.in_flight == 0)
    assert engine.stats().running == 0


@pytest.mark.parametrize("length", ["30000000", None])
def test_body_that_is_too_long_is_answered(start_server, length):
    """The client reads the answer though it was still sending."""
    url, _ = start_server()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        kind = f"Content-Length: {length}" if length else "Transfer-Encoding: chunked"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n".encode())
        for _ in range(30):
            block = b"x" * 10**6
            connection.sendall(block if length else b"%x\r\n%s\r\n" % (len(block), block))
        if not length:
            connection.sendall(b"0\r\n\r\n")
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer


def test_pipelined_request_is_no_disconnect(start_server, engine):
    """A second request on the connection waits for the first."""
    url, _ = start_server()
    engine.step_seconds = 0.005
    with posted(url, "/v1/completions", prompt="x", max_tokens=5) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert not engine.cancelled


def test_work_is_cancelled_only_when_the_client_goes():
    async def receive():
        await asyncio.sleep(60)

    async def work():
        return 5

    assert asyncio.run(until_disconnect(receive, work())) == 5


def test_events_are_closed_when_the_client_goes():
    closed = []

    async def events():
        try:
            yield "second"
        finally:
            closed.append(True)

    async def main():
        sent = asyncio.Event()

        async def receive():
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if b"second" in message.get("body", b""):
                sent.set()
                await asyncio.sleep(60)

        generator = events()
        await EventStream("first", generator, None)({}, receive, send)
        assert closed == [True]
        return generator  # kept until here: collecting it would close it too

    asyncio.run(main())
