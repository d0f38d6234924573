"""Tests of the time limit for the head of a request."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from dbrx_jax.serving.head_limit import HeadLimit
from dbrx_jax.serving.server import bind

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SECONDS = 0.3


async def answer_late(_scope, _receive, send):
    """An application that takes longer than the limit for a head."""
    await asyncio.sleep(1.5 * SECONDS)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def connect(monkeypatch):
    """A function that connects to a server."""
    monkeypatch.setattr("dbrx_jax.serving.head_limit.HEAD_SECONDS", SECONDS)
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(contextlib.closing(bind("127.0.0.1", 0)))
        bound.listen()
        server = uvicorn.Server(uvicorn.Config(answer_late, http=HeadLimit, lifespan="off", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        yield lambda: stack.enter_context(socket.create_connection(bound.getsockname(), timeout=10))


def is_closed_in_time(connection):
    begin = time.monotonic()
    assert connection.recv(1000) == b""
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("sent", [b"", REQUEST[:20]])
def test_no_head(connect, sent):
    connection = connect()
    connection.sendall(sent)
    is_closed_in_time(connection)


def test_a_byte_now_and_then(connect):
    connection, begin = connect(), time.monotonic()

    def dribble():
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(SECONDS / 5)

    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        dribble()
    assert SECONDS < time.monotonic() - begin < 5


def test_answers_and_pauses_may_take_longer(connect):
    connection = connect()
    for _ in range(2):
        connection.sendall(REQUEST)
        assert connection.recv(1000).startswith(b"HTTP/1.1 204 ")
        time.sleep(1.5 * SECONDS)
    connection.sendall(REQUEST[:20])
    is_closed_in_time(connection)
