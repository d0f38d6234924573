"""Tests of the benchmark of servers: users, figures, static batches, and a whole run on a tiny model."""

import dataclasses
import http.server
import json
import threading

import numpy as np
import pytest

from benchmarks import serve, users
from benchmarks.checkpoints import write_random
from benchmarks.gpu.serve import is_held
from benchmarks.record import BenchmarkError
from benchmarks.servers import find_llama_server
from benchmarks.users import Served, User
from benchmarks.workers import serve as worker
from dbrx_jax.config import DbrxConfig
from tests.benchmarks.test_benchmarks import MACHINE, SHALLOW, run


def test_users_come_at_random_with_mixed_lengths():
    made = users.make_users(1, 500, 0.5, 40, 8, 1000)
    assert made == users.make_users(1, 500, 0.5, 40, 8, 1000) != users.make_users(2, 500, 0.5, 40, 8, 1000)
    gaps = np.diff([user.arrival for user in made])
    assert made[0].arrival == 0
    assert gaps.min() >= 0
    assert (gaps.mean(), gaps.std()) == (pytest.approx(0.5, rel=0.15), pytest.approx(0.5, rel=0.2))
    lengths, limits = [len(user.prompt) for user in made], [user.tokens for user in made]
    assert (min(lengths), max(lengths)) == (20, 60)
    assert (min(limits), max(limits)) == (2, 32)
    assert 7 < np.mean(limits) < 9
    assert max(max(user.prompt) for user in made) == 998  # the last token is special


def test_load_figures_are_of_all_users_tokens_and_waits():
    served = [Served(0.0, [(1.0, 1), (3.0, 2)]), Served(2.0, [(5.0, 1), (6.0, 1), (10.0, 5)])]
    figures = serve.load_figures(served)
    assert figures == {
        "tokens_per_second": 1.0,
        "first_token_median_seconds": 2.0,
        "between_tokens_median_seconds": 2.0,
        "total_median_seconds": 5.5,
        "first_token_p99_seconds": pytest.approx(2.98),
        "between_tokens_p99_seconds": pytest.approx(3.96),
        "total_p99_seconds": pytest.approx(7.95),
    }


@pytest.mark.parametrize(("last", "held"), [(3.9, True), (4.1, False)])
def test_a_rate_is_held_if_later_users_wait_no_longer(last, held):
    waits = [1.5, 1.5, 9.0, 9.0, last, last]
    assert is_held([Served(i, [(i + wait, 1)]) for i, wait in enumerate(waits)]) == held


def test_static_batches_run_until_their_last_row_is_done(monkeypatch):
    """Users at 0, 1, 2 and 20 s; each step takes a second, in batches of two."""
    now = [0.0]
    batches = []

    class SlowEngine(worker.Engine):
        def stream(self, prompts, tokens, rows, positions):
            batches.append((prompts, tokens, rows, positions))
            for _ in range(tokens):
                now[0] += 1
                yield 1

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    coming = [(0.0, [5], 2), (1.0, [6], 1), (2.0, [7], 3), (20.0, [8], 1)]
    events = worker.batches(SlowEngine(), coming, 2, 9)["events"]
    assert batches == [([[5]], 2, 2, 9), ([[6], [7]], 3, 2, 9), ([[8]], 1, 2, 9)]
    assert events == [[(1.0, 1), (2.0, 1)], [(3.0, 1)], [(3.0, 1), (4.0, 1), (5.0, 1)], [(21.0, 1)]]


@pytest.fixture
def fake_server():
    """A server whose streams have these events; yields its port, a function that sets them, and the bodies it got."""
    events, bodies = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if events else 429)
            self.end_headers()
            for event in events:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], events, bodies
        server.shutdown()
        thread.join()


def _event(text, number=None):
    return {"choices": [{"text": text}], "usage": None if number is None else {"completion_tokens": number}}


def test_tokens_are_counted_by_usage_and_else_by_events(fake_server):
    port, events, bodies = fake_server
    last = {"choices": [], "usage": {"completion_tokens": 5}}
    events += [_event("t1,t2,", 2), _event("", 3), _event("t4,", 4), _event("t5,", 5), last]
    answer = users.ask(port, [3, 4], 5)
    assert ([number for _, number in answer.events], answer.text) == ([2, 2, 1], "t1,t2,t4,t5,")
    assert (bodies[0]["prompt"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == ([3, 4], 5, 0)
    events[:] = [_event("t1,"), _event("t2,"), {"choices": [], "usage": {"completion_tokens": 2}}]
    (served,) = users.ask_all(port, [User(0.0, [3], 2)])
    assert [number for _, number in served.events] == [1, 1]
    assert 0 <= served.first_token < 5
    with pytest.raises(BenchmarkError, match="expected 7 tokens, got 2"):
        users.ask(port, [3], 7)
    events.clear()
    with pytest.raises(BenchmarkError, match="status 429"):
        users.ask(port, [3], 7)


def test_missing_llama_server_is_reported_in_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("DBRX_LLAMA_SERVER", raising=False)
    with pytest.raises(BenchmarkError, match="--llama-server or DBRX_LLAMA_SERVER"):
        find_llama_server(None)
    with pytest.raises(BenchmarkError, match="is not a program"):
        find_llama_server(tmp_path)


@pytest.mark.slow
def test_serve_benchmark_measures_server_and_static_batches(monkeypatch, tmp_path, capsys):
    config: DbrxConfig = dataclasses.replace(SHALLOW, vocab_size=320, max_seq_len=640)
    write_random(config, tmp_path / "tiny")
    monkeypatch.setattr("benchmarks.options.measure_apart", lambda: MACHINE)
    options = ("--dtype", "float32", "--folder", tmp_path / "cache", "--output", tmp_path / "s.json", "--rounds", 1)
    sizes = ("--shrink", 50, "--batch", 2, "--users", 3, "--turn", 300, "--rates", 4, 0.5)
    assert run(monkeypatch, "serve", "--model", tmp_path / "tiny", *options, *sizes) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert (result["benchmark"], result["prompt"], result["tokens"], result["users"]) == ("serve", 40, 5, 3)
    (figures,) = result["rounds"]
    assert set(figures) == {"dbrx_jax", "static batches"}
    assert set(figures["dbrx_jax"]) - set(figures["static batches"]) == {
        "first_turn_first_token_seconds",
        "second_turn_first_token_seconds",
    }
    for values in figures.values():
        assert min(values.values()) > 0
        assert values["rate_4_total_median_seconds"] >= values["rate_4_first_token_median_seconds"]
    ratio = result["summary"]["ratio"]["rate_4_tokens_per_second"]["median"]
    rates = (figures[name]["rate_4_tokens_per_second"] for name in ("dbrx_jax", "static batches"))
    assert ratio == pytest.approx(next(rates) / next(rates))
    assert "rate 4 tokens per second" in capsys.readouterr().out
