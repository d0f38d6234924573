"""Users of a server with OpenAI's API: each sends a prompt at its time, and notes when the new tokens come."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import BenchmarkError

TIMEOUT = 600


class User(NamedTuple):
    """A prompt, and when it comes."""

    arrival: float  # seconds after the first
    prompt: list[int]
    tokens: int  # new ones


class Served(NamedTuple):
    """New tokens that a user got; times are seconds after the first user's arrival."""

    arrival: float
    events: list[tuple[float, int]]  # time and number of tokens

    @property
    def first_token(self) -> float:
        return self.events[0][0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with tokens."""
        return np.diff([time for time, _ in self.events]).tolist()


def make_users(seed: int, number: int, interval: float, prompt: int, tokens: int, vocab_size: int) -> list[User]:
    """Returns users with Poisson arrivals and mixed lengths.

    Prompts are uniform from half to one and a half of `prompt` random tokens. New tokens are exponential with the mean
    `tokens`, at least 2 and at most four times that.

    Args:
      interval: mean seconds between two users; 0 is all at once.
    """
    rng = np.random.default_rng(seed)
    arrivals = poisson_arrivals(rng, number, interval)
    lengths = rng.integers(max(1, prompt // 2), prompt * 3 // 2 + 1, number)
    limits = np.clip(rng.exponential(tokens, number).round(), 2, 4 * tokens).astype(int)
    prompts = [rng.integers(0, vocab_size - 1, length).tolist() for length in lengths]
    return [User(a, p, int(n)) for a, p, n in zip(arrivals, prompts, limits, strict=True)]


def poisson_arrivals(rng: np.random.Generator, number: int, interval: float) -> list[float]:
    """Returns increasing times in seconds, the first 0, with random gaps of the mean `interval`."""
    gaps = rng.exponential(1.0, number - 1) * interval
    return [0.0, *np.cumsum(gaps).tolist()]


def ask_all(port: int, users: Sequence[User]) -> list[Served]:
    """Sends all users' requests at their times, each in a thread, and returns what they saw.

    Raises:
      BenchmarkError: a request failed.
    """
    begin = time.perf_counter()

    def ask_in_time(user: User) -> Served:
        time.sleep(max(0.0, begin + user.arrival - time.perf_counter()))
        events = [(at - begin, number) for at, number in ask(port, user.prompt, user.tokens).events]
        return Served(user.arrival, events)

    with ThreadPoolExecutor(len(users)) as pool:
        return list(pool.map(ask_in_time, users))


class Answer(NamedTuple):
    """A streamed completion."""

    events: list[tuple[float, int]]  # time.perf_counter and number of new tokens
    text: str


def ask(port: int, prompt: list[int], tokens: int) -> Answer:
    """Streams a greedy completion, which no token ends.

    Raises:
      BenchmarkError: the answer is an error, or has another number of tokens.
    """
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise BenchmarkError(f"port {port}: status {answer.status}: {answer.read(200).decode(errors='replace')}")
        events, text, known, usage = [], "", 0, {}
        while line := answer.readline():
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                continue
            event: dict[str, Any] = json.loads(line[6:])
            usage = event.get("usage") or usage
            new = event["choices"][0]["text"] if event.get("choices") else ""
            if new:
                # llama-server sends each token in an event of its own, without the usage.
                count = event["usage"]["completion_tokens"] if event.get("usage") else known + 1
                events.append((now, count - known))
                known, text = count, text + new
    if usage.get("completion_tokens") != tokens or not events:
        raise BenchmarkError(f"port {port}: expected {tokens} tokens, got {usage.get('completion_tokens')}")
    return Answer(events, text)


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
