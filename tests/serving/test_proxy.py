"""examples/nginx.conf before two servers: streams, clients that go away, long bodies, draining, and sessions."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest

from dbrx_jax.serving.server import bind
from tests.serving.fake_engine import FakeEngine
from tests.serving.helpers import refused
from tests.serving.test_disconnect import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx, which Debian has"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "nginx.conf"
COUNTED = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@pytest.fixture
def replicas(start_server, tokenizer):
    """Two servers: the engine and the state of each, by its URL."""
    engines = [FakeEngine(tokenizer, step_seconds=0.01) for _ in range(2)]
    yield {url: (engine, state) for engine in engines for url, state in [start_server(engine=engine)]}
    for engine in engines:
        engine.close()


@pytest.fixture
def proxy(replicas, tmp_path):
    """A client of nginx before them."""
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", certificate, "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    with contextlib.closing(bind("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    text = EXAMPLE.read_text()
    first, second = (url.removeprefix("http://") for url in replicas)
    changes = {
        "127.0.0.1:8000": first, "127.0.0.1:8001": second, "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/nginx/tls.crt": str(certificate), "/etc/nginx/tls.key": str(key),
        "http {": "\n".join(["http {", "access_log off;", *(f"{n}_temp_path {tmp_path}/{n};" for n in COUNTED)]),
    }  # fmt: skip
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    config = tmp_path / "nginx.conf"
    config.write_text(text)
    options = f"daemon off; pid {tmp_path}/pid; error_log stderr;"
    if os.geteuid() == 0:
        options += " user root;"  # else nobody, who cannot write there
    nginx = subprocess.Popen(["nginx", "-p", tmp_path, "-c", config, "-g", options])
    try:
        with httpx2.Client(
            base_url=f"https://localhost:{port}", verify=ssl.create_default_context(cafile=certificate), timeout=20
        ) as client:
            wait_for(lambda: answers(client), 10)
            yield client
    finally:
        nginx.terminate()
        nginx.wait()


def answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


def num_requests(replicas):
    return [len(engine.requests) for engine, _ in replicas.values()]


def test_events_come_one_by_one_and_a_client_that_goes_away_cancels(proxy, replicas):
    body = {"prompt": "x", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with proxy.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.iter_lines()
        for _ in range(20):
            line = next(line for line in lines if line)
            assert json.loads(line.removeprefix("data: "))["choices"]
        (used,) = (engine for engine, _ in replicas.values() if engine.requests)
        assert used.stats().running == 1
        assert used.stats().generation_tokens < 100
    wait_for(lambda: used.cancelled)
    assert used.stats().running == 0


def test_errors_are_those_of_the_servers(proxy):
    refused(proxy.post("/v1/completions", json={"prompt": 5}), 400, "prompt", param="prompt")
    refused(proxy.post("/v1/completions", content=b" " * (5 << 20)), 413, "bytes", code="request_too_large")
    assert proxy.get("/metrics").status_code == 404
    assert proxy.get("/").headers["content-security-policy"]


def test_replica_that_drains_is_passed_over(proxy, replicas):
    (first, first_state), (second, second_state) = replicas.values()
    body = {"prompt": "x", "max_tokens": 2}
    first_state.draining = True
    for number in range(8):
        assert proxy.post("/v1/completions", json=body, headers={"X-Session-Id": str(number)}).status_code == 200
    assert (len(first.requests), len(second.requests)) == (0, 8)
    second_state.draining = True
    response = proxy.post("/v1/completions", json=body)
    refused(response, 503, "shutting down", code="service_unavailable")
    assert response.headers["retry-after"] == "2"


def test_sessions_stay_with_their_replica(proxy, replicas):
    counts = []
    for number in range(12):
        before = num_requests(replicas)
        for _ in range(3):
            headers = {"X-Session-Id": f"session {number}"}
            proxy.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
        counts.append([new - old for new, old in zip(num_requests(replicas), before, strict=True)])
    assert set(map(tuple, counts)) == {(3, 0), (0, 3)}
