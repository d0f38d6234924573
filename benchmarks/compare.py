"""Measuring in alternation: ours, the peer, ours, the peer; then medians, and the median of the ratios."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.engines import OURS, Engine
from benchmarks.record import BenchmarkError

# Of the largest logit; more is another computation. The engines were seen to differ by 1e-6, 0.01, 0.04 and, where
# each quantises in a way of its own, by 0.13 on random weights, where unrelated logits differ by 2.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.2, "int4": 0.5}
CHECKED_TOKENS = 8

Figures = dict[str, float]  # of those named …_per_second more is better, of others less is


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def alternate(engines: Sequence[N], measure: Callable[[N, int], Figures], rounds: int) -> list[dict[str, Figures]]:
    """Every engine measured once a round, in turn.

    Args:
      measure: gives an engine's figures; called with the round's number, 0 being the warm-up that is not kept.
    """
    for engine in engines:
        measure(engine, 0)
    return [{engine.name: measure(engine, number) for engine in engines} for number in range(1, rounds + 1)]


def summary(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and largest of each engine's figures, and of their ratios under "ratio".

    A ratio says how many times better ours is, and is taken within a round.
    """
    result = {
        name: {figure: _spread([r[name][figure] for r in rounds]) for figure in figures}
        for name, figures in rounds[0].items()
    }
    for peer in set(result) - {OURS}:
        result["ratio"] = {
            figure: _spread([better(figure, r[OURS][figure], r[peer][figure]) for r in rounds])
            for figure in rounds[0][OURS]
        }
    return result


def better(figure: str, mine: float, other: float) -> float:
    """The ratio by which `mine` is better than `other`."""
    return mine / other if figure.endswith("_per_second") else other / mine


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def check_same(engine: Engine, peer: Engine, prompt: list[int], dtype: str) -> dict[str, Any]:
    """Compares what both predict behind a prompt, so that the speeds are those of the same computation.

    Raises:
      BenchmarkError: they differ by more than the type of the weights explains.
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
