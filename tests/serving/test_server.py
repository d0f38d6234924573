"""Tests of the server's process: signals, draining, and the engine's end."""

import asyncio
import contextlib
import gc
import json
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from dbrx_jax.errors import ConfigError
from dbrx_jax.serving.server import bind, run_server, url_of
from tests.serving.test_disconnect import wait_for

BODY = {"prompt": "x", "stream": True, "ignore_eos": True}


@contextlib.contextmanager
def running(step_seconds=0.01, drain_seconds=10.0, fail_seconds=0.0, before=()):
    """A server's process and a client of it; `before` is what stands before its command."""
    arguments = [
        *before,
        sys.executable,
        "-m",
        "tests.serving.serve_fake",
        *map(str, (step_seconds, drain_seconds, fail_seconds)),
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with httpx2.Client(base_url=process.stdout.readline().strip(), timeout=20) as client:
            wait_for(lambda: answers(client), 20)
            yield process, client
    finally:
        process.kill()
        process.communicate()


def answers(client):
    try:
        return client.get("/version").status_code == 200
    except httpx2.TransportError:
        return False


def test_small_parts_of_an_answer_do_not_wait_for_each_other():
    """asyncio turns Nagle's algorithm off on the connections of the server's socket."""

    async def main():
        served = asyncio.Event()

        async def serve(_, writer):
            connection = writer.get_extra_info("socket")
            seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            served.set()

        with contextlib.closing(bind("127.0.0.1", 0)) as bound:
            async with await asyncio.start_server(serve, sock=bound):
                with socket.create_connection(bound.getsockname()):
                    await served.wait()

    seen = []
    asyncio.run(main())
    assert seen == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_that_run_end_and_new_ones_are_refused(number):
    with running() as (process, client):
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 60}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            wait_for(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert refused.json()["error"]["code"] == "service_unavailable"
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) == 60
        assert process.wait(10) == 0
        assert process.stderr.read() == "Requests have 10 seconds to end; running: 1; Ctrl-C ends them now\n"


def test_idle_server_ends_at_once():
    with running() as (process, _):
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - begin < 5
        assert process.stderr.read() == ""


def test_requests_end_with_an_error_when_the_time_is_over():
    with running(drain_seconds=0.3) as (process, client):
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 1000}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "service_unavailable"
        assert process.wait(10) == 0


def test_second_interrupt_ends_at_once():
    body = {**BODY, "max_tokens": 1000}
    with running() as (process, client), client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: client.get("/health").status_code == 503)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().splitlines()[-1] == "dbrx-jax: interrupted"
        assert time.monotonic() - begin < 5
        with pytest.raises(httpx2.TransportError):
            list(lines)


def test_an_engine_that_fails_ends_the_server():
    with running(fail_seconds=2.0) as (process, client):
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 1000}) as response:
            events = [line for line in response.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "service_unavailable"
        assert process.wait(10) == 1
        assert process.stderr.read() == "The engine failed: RuntimeError('no more memory')\n"


def test_more_connections_than_the_soft_limit_of_files():
    """Systems often allow 1,024 files unless a process asks for more, and as many requests may wait."""
    limited = ("sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh")
    with running(before=limited) as (_, client), contextlib.ExitStack() as stack:
        for _ in range(90):
            stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_collecting_garbage_does_not_look_at_the_model(make_client, monkeypatch):
    """With JAX, models and modules are half a million objects, and each full collection held all requests up."""
    app = make_client().app
    monkeypatch.setattr(asyncio, "run", lambda coroutine: coroutine.close())
    monkeypatch.setattr(gc, "collect", lambda: None)  # of what other tests have left
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        try:
            assert run_server(app, bound, 0.0) == 0
            assert gc.get_freeze_count() > 0.9 * (gc.get_freeze_count() + len(gc.get_objects()))
        finally:
            gc.unfreeze()


def test_addresses():
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(
            ConfigError, match=rf"--port {port}: cannot be used on 127.0.0.1 \(Address already in use\)"
        ):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host no.such.host.invalid: is no address"):
        bind("no.such.host.invalid", 0)
    if socket.has_ipv6:
        with contextlib.suppress(ConfigError), contextlib.closing(bind("::1", 0)) as bound:
            assert url_of(bound).startswith("http://[::1]:")
