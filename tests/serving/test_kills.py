"""Clients and servers that are killed or told to end while requests run, over the engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from tests.serving import small_server
from tests.serving.test_disconnect import wait_for

pytestmark = pytest.mark.slow
BODY = {"temperature": 0, "stream": True, "ignore_eos": True}
CLIENT = """
import sys, httpx2
body = {"prompt": [5, 6], "max_tokens": 4000, "stream": True, "ignore_eos": True}
with httpx2.stream("POST", sys.argv[1] + "/v1/completions", json=body, timeout=60) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""


def serving(blocks=200, **options):
    """Starts a server whose streams may be long; its programs are compiled, or read, when they are needed."""
    return small_server.serving(blocks=blocks, positions=4096, warm_up=False, **options)


class Stream(threading.Thread):
    """A client that reads a stream to its end.

    Attributes:
      events: that came.
      error: that ended it.
    """

    def __init__(self, server, prompt, max_tokens, **body):
        super().__init__(daemon=True)
        self._client, self._body = server.client, {**BODY, "prompt": prompt, "max_tokens": max_tokens, **body}
        self.events, self.error, self.first = [], None, None
        self.start()

    def run(self):
        try:
            with self._client.stream("POST", "/v1/completions", json=self._body) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    self.first = self.first or time.monotonic()
                    self.events += [line.removeprefix("data: ")] if line else []
        except httpx2.TransportError as error:
            self.error = error

    def text(self) -> str:
        """Waits for the end; returns the text of a stream that ended well."""
        self.join(60)
        assert self.error is None, self.error
        assert self.events[-1] == "[DONE]", self.events[-1]
        return "".join(json.loads(event)["choices"][0]["text"] for event in self.events[:-1])


def begun(server, *arguments, **body):
    """Starts a stream and waits for its first event."""
    stream = Stream(server, *arguments, **body)
    wait_for(lambda: stream.events, 60)
    return stream


def is_gone(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{number}/status") as status:
        return "State:\tZ" in status.read()


def test_killed_client_frees_its_row_and_others_go_on():
    """All rows are taken, and the request that waits begins when the client has been killed."""
    with serving() as server:
        alone = Stream(server, [7, 9], 1000).text()
        with subprocess.Popen([sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout.readline().startswith("data: ")
            others = [begun(server, [7, 9], 1000) for _ in range(5)]
            waiting = Stream(server, [3, 3], 5)
            wait_for(lambda: server.metric("vllm:num_requests_waiting") == 1)
            assert not waiting.events
            client.kill()
            killed = time.monotonic()
            waiting.text()
            assert waiting.first - killed < 1
            assert all(other.is_alive() for other in others)
        assert [other.text() for other in others] == [alone] * 5
        wait_for(server.is_idle)
        assert server.metric("vllm:request_success_total") == 1 + 5 + 1 + 1  # the last was aborted


def test_killed_server_breaks_streams_and_starts_again_on_its_port():
    with serving() as server:
        content = [{"role": "user", "content": "x"}]
        answer = {"messages": content, "max_tokens": 9, "temperature": 0}
        first = server.client.post("/v1/chat/completions", json=answer).json()["choices"]
        children = server.children()
        assert children  # chat templates run in one
        streams = [begun(server, [number, 9], 4000) for number in range(6)]
        port = server.port
        server.process.kill()
        for stream in streams:
            stream.join(10)
            assert isinstance(stream.error, httpx2.TransportError)
            assert "[DONE]" not in stream.events
        wait_for(lambda: all(map(is_gone, children)))
    with serving(port=port) as server:
        assert server.port == port
        again = server.client.post("/v1/chat/completions", json=answer).json()["choices"]
        assert again == first


def test_server_that_is_told_to_end_finishes_what_it_has_taken():
    """Six requests run, and two wait."""
    with serving() as server:
        alone = Stream(server, [7, 9], 500).text()
        streams = [begun(server, [7, 9], 500) for _ in range(6)]
        streams += [Stream(server, [7, 9], 500) for _ in range(2)]
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.client.get("/health").status_code == 503)
        refused = server.client.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert [stream.text() for stream in streams] == [alone] * 8
        assert server.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
            pass


def test_requests_that_outlast_the_draining_end_with_an_error():
    with serving(drain_seconds=0.2) as server:
        streams = [begun(server, [number, 9], 4000) for number in range(6)]
        waiting = server.client.build_request("POST", "/v1/completions", json={"prompt": "x"})
        statuses = []
        thread = threading.Thread(target=lambda: statuses.append(server.client.send(waiting).status_code))
        thread.start()
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        thread.join(10)
        assert statuses == [503]
        for stream in streams:
            stream.join(10)
            assert stream.error is None
            assert json.loads(stream.events[-1])["error"]["code"] == "service_unavailable"


def test_full_server_refuses_and_serves_the_others_in_order():
    """The first request grows to all blocks, and each of the others needs most of them."""
    with serving(blocks=14, max_waiting=3) as server:
        streams = [begun(server, [9] * 200, 1500)]
        for number in range(3):
            streams.append(Stream(server, [number] * 1600, 20))
            wait_for(lambda waiting=number + 1: server.metric("vllm:num_requests_waiting") == waiting, 30)
        refused = server.client.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert not any(stream.events for stream in streams[1:])
        for stream in streams:
            stream.text()
        times = [stream.first for stream in streams]
        assert times == sorted(times)
        assert server.metric("vllm:num_preemptions_total") == 0
        assert server.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
