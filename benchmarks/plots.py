"""Draws bar plots of the results as SVG files; the same results give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import OURS
from benchmarks.record import BenchmarkError

COLOURS = {OURS: "#d9480f", "transformers": "#1864ab", "llama.cpp": "#5f3dc4"}
TITLES = {"decode": "Decoding, tokens/s", "prefill": "Prompts, tokens/s"}
FIGURE = "tokens_per_second"


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Draws a plot of each kind of benchmark with comparisons, replaces `folder`'s plots, and returns the file names.

    Raises:
      BenchmarkError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchmarkError("plots need matplotlib: pip install '.[benchmarks]'") from None
    matplotlib.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    names = []
    settings: Any = {"svg.hashsalt": "dbrx", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for kind, title in TITLES.items():
            compared = [r for r in results if r["benchmark"] == kind and r["against"] in COLOURS]
            if compared:
                _bars(compared, title, folder / f"{kind}.svg")
                names.append(f"{kind}.svg")
    return names


def label(result: dict[str, Any]) -> str:
    """Returns the label of a comparison's bars."""
    batch = f", batch {result['batch']}" if "batch" in result else ""
    return f"{result['model']}, {result['dtype']}{batch}, jax {result['versions']['jax']}"


def _bars(results: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draws each comparison's two rates as shares of the roofline, annotated with tokens/s."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.55 * len(results)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    in_legend = set()
    for row, result in enumerate(results):
        for side, engine in ((-0.2, OURS), (0.2, result["against"])):
            value = result["summary"][engine][FIGURE]["median"]
            percent = 100 * value / result["roofline"][FIGURE]
            legend_label = None if engine in in_legend else engine
            axes.barh(row + side, percent, 0.36, color=COLOURS[engine], label=legend_label)
            axes.annotate(f"{value:,.1f}", (percent, row + side), (3, 0), textcoords="offset points", va="center")
            in_legend.add(engine)
    axes.set_yticks(range(len(results)), [label(r) for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("percent of the roofline that was measured in the same run")
    axes.set_title(title)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
