"""Measures the users a second that the engine serves on this GPU: 2000 tokens in and 256 out, as announced."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import roofline
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.speed import make_model
from benchmarks.machine import Machine
from benchmarks.serve import load_figures
from benchmarks.users import Served, User, poisson_arrivals
from dbrx_jax import Engine, Request
from dbrx_jax.generation_config import GenerationConfig

SHARES = (0.9, 0.7)  # of the users a second when all wait, at which users then arrive at random
SLOWER = 2.0  # a rate is held if the last third of its users wait at most so many times as long as the first third
GRACE = 1.0  # seconds that they may wait longer anyhow

Row = dict[str, Any]


def serve(size: Size, machine: Machine, precision: str) -> Iterator[Row]:
    """Yields users a second when all wait from the start, and latencies and whether it holds for lower rates."""
    model, config, facts = make_model(size, precision)
    yield facts
    prompt, tokens = roofline.ANNOUNCED_PROMPT, roofline.ANNOUNCED_TOKENS
    if size.prompt < prompt:
        prompt, tokens = size.prompt, size.steps
    begin = time.perf_counter()
    with Engine(model, max_rows=size.rows, max_length=prompt + tokens) as engine:
        facts = {"precision": precision, "layers": config.n_layers, "prompt": prompt, "tokens": tokens}
        facts |= {"rows": size.rows, "users": size.served, "blocks": engine.stats().blocks}
        yield {**facts, "compiled_in_seconds": round(time.perf_counter() - begin, 1)}
        ask_all(engine, _users(config.vocab_size, 0, min(size.rows, size.served), 0.0, prompt, 2))  # a warm-up
        capacity = 0.0
        for number, share in enumerate((None, *SHARES), 1):
            interval = 0.0 if share is None else 1 / (share * capacity)
            served = ask_all(engine, _users(config.vocab_size, number, size.served, interval, prompt, tokens))
            figures = load_figures(served)
            if share is None:
                capacity = figures["tokens_per_second"] / tokens
            row = {**facts, "users_per_second": round(capacity * (share or 1.0), 3), "all_wait": share is None}
            if share is not None:
                row["held"] = is_held(served)
            yield row | {name: round(value, 4) for name, value in figures.items()}
        yield {**facts, "compilations_after_warmup": engine.stats().compilations_after_warmup}


def _users(vocab_size: int, seed: int, number: int, interval: float, prompt: int, tokens: int) -> list[User]:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (number, prompt)).tolist()
    arrivals = poisson_arrivals(rng, number, interval)
    return [User(arrival, ids, tokens) for arrival, ids in zip(arrivals, prompts, strict=True)]


def ask_all(engine: Engine, users: Sequence[User]) -> list[Served]:
    """Submits all users' requests at their times, and returns what they saw."""
    begin = time.perf_counter()

    def ask(user: User) -> Served:
        time.sleep(max(0.0, begin + user.arrival - time.perf_counter()))
        request = Request(user.prompt, GenerationConfig(max_new_tokens=user.tokens))
        events = [(time.perf_counter() - begin, len(chunk.tokens)) for chunk in engine.submit(request)]
        return Served(user.arrival, events)

    with ThreadPoolExecutor(len(users)) as pool:
        return list(pool.map(ask, users))


def is_held(served: Sequence[Served]) -> bool:
    """Returns whether the queue did not grow: the last third waited about as long for a first token as the first."""
    third = max(1, len(served) // 3)
    first, last = (float(np.median([u.first_token for u in part])) for part in (served[:third], served[-third:]))
    return last <= SLOWER * first + GRACE
