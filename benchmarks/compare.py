"""Measures engines in turn, and summarises figures and their ratios by median and range."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.engines import OURS, Engine
from benchmarks.record import BenchmarkError

# Largest difference of logits, relative to the largest logit. Seen on random weights: 1e-6, 0.01, 0.04 and 0.13 (int4
# formats differ); unrelated logits differ by 2.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.2, "int4": 0.5}
CHECKED_TOKENS = 8

Figures = dict[str, float]  # by name; …_per_second is better if larger, others if smaller


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def alternate(engines: Sequence[N], measure: Callable[[N, int], Figures], rounds: int) -> list[dict[str, Figures]]:
    """Measures every engine once a round, in turn; returns each round's figures by engine.

    Args:
      measure: returns an engine's figures, given the round's number; round 0 is a warm-up that is discarded.
    """
    for engine in engines:
        measure(engine, 0)
    return [{engine.name: measure(engine, number) for engine in engines} for number in range(1, rounds + 1)]


def summary(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns median, minimum and maximum of each engine's figures, and of their ratios under "ratio".

    A ratio is that of one round; above 1, ours is better. With several peers their names follow: "ratio to NAME".
    """
    result = {
        name: {figure: _spread([r[name][figure] for r in rounds]) for figure in figures}
        for name, figures in rounds[0].items()
    }
    peers = [name for name in result if name != OURS]
    for peer in peers:
        result["ratio" if len(peers) == 1 else f"ratio to {peer}"] = {
            figure: _spread([better(figure, r[OURS][figure], r[peer][figure]) for r in rounds])
            for figure in rounds[0][OURS]
            if figure in rounds[0][peer]
        }
    return result


def better(figure: str, mine: float, other: float) -> float:
    """Returns the ratio of two values of a figure, above 1 if `mine` is better."""
    return mine / other if figure.endswith("_per_second") else other / mine


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def check_same(engine: Engine, peer: Engine, prompt: list[int], dtype: str) -> dict[str, Any]:
    """Checks that two engines compute the same logits after a prompt; also compares greedy tokens.

    Raises:
      BenchmarkError: the logits differ by more than MAX_DIFFERENCE.
    """
    mine, other = (e.ask("check", prompt=prompt, tokens=CHECKED_TOKENS) for e in (engine, peer))
    a, b = np.array(mine["logits"]), np.array(other["logits"])
    if a.shape != b.shape:
        raise BenchmarkError(f"{peer.name}: gives {b.size} logits, and {engine.name} {a.size}")
    difference, largest = float(np.abs(a - b).max()), float(np.abs(a).max())
    if not difference <= MAX_DIFFERENCE[dtype] * largest:
        raise BenchmarkError(
            f"{peer.name}: logits differ by up to {difference:.3g} from {engine.name}'s, of which the largest is "
            f"{largest:.3g}: this is another computation, and its speed says nothing"
        )
    agree = sum(x == y for x, y in zip(mine["greedy"], other["greedy"], strict=True))
    return {"largest_difference": difference, "largest_logit": largest, "greedy_tokens": f"{agree} of {CHECKED_TOKENS}"}
