"""The command report: writes docs/benchmarks.md and its plots from the results; the same JSON gives the same bytes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import OURS
from benchmarks.record import RESULTS, ROOT, BenchmarkError
from benchmarks.show import number, quantity, share, words
from dbrx_jax.console import print_status

DTYPES = ("float32", "bfloat16", "int8", "int4")
LATENCIES = ("first_token_median_seconds", "first_token_p95_seconds", "total_median_seconds", "total_p95_seconds")

HEAD = """# Benchmarks

`python -m benchmarks report` makes this page from the JSON files in `benchmarks/results`. Every number was
measured by one of the commands below; the last table has the machine and the day.

```bash
pip install -e '.[benchmarks]'   # from the repository's root, as all that follows
python -m benchmarks decode --model bench --dtype bfloat16 --batch 8
python -m benchmarks prefill --model bench --dtype float32 --against transformers
python -m benchmarks decode --model bench --dtype int8 --against bfloat16   # ours, not quantised
python -m benchmarks throughput --model bench --against llama.cpp
python -m benchmarks serve --model bench --against llama.cpp
python -m benchmarks load --model bench
python -m benchmarks convert --folder /a/folder/on/the/disk
```

`bench` is a DBRX of 0.79 billion parameters (0.26 active) with random weights, `demo` the one in the package.
Each peer needs a virtual environment of its own. Name its Python by `--against-python`, or by
`DBRX_TRANSFORMERS_PYTHON` and `DBRX_LLAMA_PYTHON`:

```bash
pip install torch==2.13.0 transformers==4.57.6
pip install --no-binary llama-cpp-python llama-cpp-python gguf   # builds llama.cpp for this CPU, minutes
```

How it is measured:

- Every engine is a process of its own that keeps its model and times itself. After a warm-up the engines are
  measured in turn: ours, the peer, ours, the peer. The tables give medians. A ratio above 1 means that ours is
  better. It is the median of the rounds' ratios, with the smallest and the largest.
- Before that, both engines' logits after a prompt are compared. A difference of more than 0.1 % of the largest
  logit in float32, 10 % in bfloat16, 20 % in int8 and 50 % in int4 ends the run. (The tests are far stricter.)
- The roofline is measured in the same run: bytes over the bandwidth of all CPUs reading 1 GiB, or FLOP over the
  rate of a 2048 x 2048 matrix product in JAX, whichever takes longer. A decode step reads the experts that its
  rows are expected to use, attention, the head and the live cache; a prompt computes the head once. An engine with
  a faster matrix product can exceed it: a peer, or ours on jax 0.10.2, whose product is slower in bfloat16 than in
  float32.
- The measured bandwidth of these machines varied between processes, 32 to 41 or 57 to 66 GB/s, for an unknown
  reason. So shares of the roofline are rough. Ratios do not depend on it.
- All engines get every CPU. Prompts are random token ids, decoding is greedy, and no token ends a row. Ours
  streams tokens in bursts of 8.
- In float32 llama.cpp has a float32 cache and no flash attention, which is not exact there. Otherwise it has its
  defaults, such as a float16 cache. Our int8 is compared with Q8_0; our int4 with Q4_0 for the experts and Q8_0 for
  the rest. Their groups have 32 weights; ours are rows, or groups of 128.
- The demo's weights (at most 10 MB) fit a CPU's cache, so its share of the roofline says little.
- "Load before" is the load average of the minute before, per CPU. If it is not near 0, the machine was busy, which
  slows the peers more, because their threads wait for each other.
- The roofline assumes that rows route uniformly. Random weights do so from prompt to prompt, but not within one: four
  of the 16 experts of `bench` get 72 % of a prompt of 512 tokens, averaged over its layers.
"""

ELSEWHERE = Path(__file__).resolve().parent / "elsewhere.md"  # written by hand, from results of other scripts

THROUGHPUT = """The load of DBRX's announcement (a user each second, about 2000 tokens in and 256 out), scaled down.
Lengths are divided. The interval between users is such that serving them one by one at the roofline would take
0.71 of the time, as on the announcement's node if that had eight H100. This is generation in batches, and every
engine is driven alike: waiting users start together, at most `batch` of them, and later users wait until all of
these are done. In an open loop without overload all engines have the same tokens/s, and differ in latency.
"""

SERVE = """The same load on HTTP servers, `dbrx-jax serve` and llama.cpp's `llama-server` with as many rows: Poisson
arrivals and mixed lengths. Prompts are uniform from half to one and a half of the length in the table, new tokens are
exponential. At rate 1 users come in the intervals above on average. At rate 4 they wait, and tokens/s is what a server
can do.

- "Static batches" are dbrx_jax without HTTP: those who wait start together, until the last of them is done.
- "Between tokens" is the time between two events of a stream.
- "First turn" and "second turn" are of a conversation that begins with 2,000 tokens and goes on with 50.

Our server computes prompts in small chunks while rows run, so that a step takes at most 4 times as long: its time
between tokens is the evenest, and it serves fewer tokens/s than it could. With `--prefill-budget 512` prompts come
first, as they do at `llama-server`.

Build `llama-server` from the source in llama-cpp-python's sdist, and name it by `--llama-server` or
`DBRX_LLAMA_SERVER`.
"""

LOAD = """Loads a model from a folder into memory, in a fresh process, with the files in the page cache. The roofline
is reading the files from the page cache with all CPUs. Rates count the bytes read: 16 bits a weight, or the GGUF's.
llama.cpp reads its GGUF into memory rather than mapping it.
"""

CONVERT = """A checkpoint of DBRX's true widths with random bits, relative to `cp -r` of the same files in the same
round. All end with sync.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Make docs/benchmarks.md and its plots from the results."""

    results: Path = RESULTS
    """Folder of JSON files."""
    docs: Path = ROOT / "docs"
    """Folder to write benchmarks.md and benchmarks/ in."""

    def run(self) -> None:
        """Reads the results, draws the plots and writes the page."""
        from benchmarks.plots import draw

        found = read_results(self.results)
        plots = draw(found, self.docs / "benchmarks")
        (self.docs / "benchmarks.md").write_text(page(found, plots))
        print_status(f"Written to {self.docs / 'benchmarks.md'}, with {len(plots)} plots")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the harness' results in a folder, in the tables' order; ignores results of other scripts.

    Raises:
      BenchmarkError: a file is not JSON.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            data = json.loads(file.read_text())
        except ValueError as error:
            raise BenchmarkError(f"{file}: not JSON ({error})") from None
        if isinstance(data, dict) and ("benchmark" in data or file.stem == "convert"):
            found.append({"benchmark": "convert", **data})
    return sorted(found, key=_order)


def _order(result: dict[str, Any]) -> tuple:
    dtype = result.get("dtype")
    return (
        result["benchmark"],
        result.get("model", ""),
        DTYPES.index(dtype) if dtype in DTYPES else -1,
        result.get("batch", 0),
        result["versions"]["jax"],
        result.get("against") or "",
    )


def page(results: Sequence[dict[str, Any]], plots: Sequence[str] = ()) -> str:
    """Returns the page in Markdown.

    Args:
      plots: names of files in docs/benchmarks to show, such as decode.svg.
    """
    runs = _Runs()
    parts = [HEAD]
    for title, kind, note, table in (
        ("Decoding", "decode", "", _speed),
        ("Prompts", "prefill", "", _speed),
        ("Throughput and latency", "throughput", THROUGHPUT, _throughput),
        ("Serving", "serve", SERVE, _serve),
        ("Loading", "load", LOAD, _load),
        ("Converting", "convert", CONVERT, _convert),
    ):
        of_kind = [result for result in results if result["benchmark"] == kind]
        parts.append(f"## {title}\n")
        parts += [note] if note else []
        parts.append(table(of_kind, runs) if of_kind else "Not measured yet.\n")
        parts += [f"![{title}](benchmarks/{plot})\n" for plot in plots if plot.startswith(f"{kind}.")]
    parts.append(f"## Runs\n\n{runs.table()}")
    parts.append(f"## Measured by tests and other scripts\n\n{ELSEWHERE.read_text()}")
    return "\n".join(parts)


class _Runs:
    """Numbers the distinct runs (date, machine, versions, rates, load) of results, for the last table."""

    def __init__(self) -> None:
        self._known: list[tuple[str, ...]] = []

    def number(self, result: dict[str, Any]) -> str:
        engines = result.get("engines") or {OURS: {"python": result["python"], **result["versions"]}}
        texts = [", ".join(f"{name} {version}" for name, version in v.items()) for v in engines.values()]
        measured, speeds = result.get("measured"), ""
        if measured:
            speeds = (
                f"{measured['bandwidth'] / 1e9:.1f} GB/s; {measured['float32'] / 1e9:.0f} and "
                f"{measured['bfloat16'] / 1e9:.0f} GFLOP/s"
            )
        busy = str(result.get("load_before", ""))
        run = (result["date"], result["machine"], "; ".join(texts), speeds, busy)
        if run not in self._known:
            self._known.append(run)
        return str(self._known.index(run) + 1)

    def table(self) -> str:
        head = ("run", "date", "machine", "versions", "bandwidth; products in float32 and bfloat16", "load before")
        return _table(head, [(str(i), *run) for i, run in enumerate(self._known, 1)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    out = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in out) + "\n"


def _percent(result: dict[str, Any], engine: str, figure: str) -> str:
    part = share(result, engine, figure)
    return "" if part is None else f" ({part:.0%})"


def _ratio(result: dict[str, Any], figure: str) -> str:
    if "ratio" not in result["summary"]:
        return ""
    return _spread(result["summary"]["ratio"][figure])


def _spread(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _cells(result: dict[str, Any], figure: str) -> tuple[str, str, str]:
    """Returns the cells of one figure: ours, the peer's and the ratio."""

    def cell(engine: str) -> str:
        value = result["summary"][engine][figure]["median"]
        return quantity(figure, value) + _percent(result, engine, figure)

    other = f"{result['against']}: {cell(result['against'])}" if result["against"] else ""
    return cell(OURS), other, _ratio(result, figure)


def _speed(results: Sequence[dict[str, Any]], runs: _Runs) -> str:
    figure, rows = "tokens_per_second", []
    for r in results:
        shape = f"{r['prompt']} + {r['tokens']}" if "tokens" in r else str(r["prompt"])
        rows.append(
            (
                r["model"],
                r["dtype"],
                str(r.get("batch", 1)),
                shape,
                r["versions"]["jax"],
                number(r["roofline"][figure]),
                *_cells(r, figure),
                runs.number(r),
            )
        )
    head = ("model", "weights", "batch", "tokens", "jax", "roofline", "dbrx_jax (of roofline)", "peer", "ratio", "run")
    return _table(head, rows)


def _throughput(results: Sequence[dict[str, Any]], runs: _Runs) -> str:
    rows = []
    for r in results:
        load = (
            f"{r['users']} users, {r['prompt']} + {r['tokens']}, one in {number(r['roofline']['interval_seconds'])} s"
        )
        for figure in ("tokens_per_second", *LATENCIES):
            rows.append(
                (r["model"], r["dtype"], str(r["batch"]), load, words(figure), *_cells(r, figure), runs.number(r))
            )
    return _table(("model", "weights", "batch", "load", "what", "dbrx_jax", "peer", "ratio", "run"), rows)


def _serve(results: Sequence[dict[str, Any]], runs: _Runs) -> str:
    rows = []
    for r in results:
        summary = r["summary"]
        load = f"{r['users']} users, {r['batch']} rows, {r['prompt']} + {r['tokens']}"
        if r.get("prefill_budget"):
            load += f", prefill budget {r['prefill_budget']}"
        for figure in summary[OURS]:
            cells = [quantity(figure, summary[OURS][figure]["median"])]
            for peer in ("llama-server", "static batches"):
                if figure not in summary.get(peer, {}):
                    cells += ["", ""]
                    continue
                ratios = summary.get(f"ratio to {peer}") or summary["ratio"]
                cells += [quantity(figure, summary[peer][figure]["median"]), _spread(ratios[figure])]
            rows.append((r["model"], r["dtype"], load, words(figure), *cells, runs.number(r)))
    head = "model", "weights", "load", "what", "dbrx_jax", "llama-server", "ratio", "static batches", "ratio", "run"
    return _table(head, rows)


def _load(results: Sequence[dict[str, Any]], runs: _Runs) -> str:
    rows = []
    for r in results:
        roof, disk = r["roofline"]["bytes_per_second"], r["roofline"]["disk_bytes_per_second"]
        best = f"{roof / 1e9:.1f} GB/s cached, {f'{disk / 1e9:.2f} GB/s' if disk else 'unknown'} from the disk"
        for figure in ("load_seconds", "bytes_per_second", "anonymous_bytes"):
            rows.append((r["model"], r["dtype"], best, words(figure), *_cells(r, figure), runs.number(r)))
    return _table(("model", "in memory", "roofline", "what", "dbrx_jax", "peer", "ratio", "run"), rows)


def _convert(results: Sequence[dict[str, Any]], runs: _Runs) -> str:
    rows = []
    for r in results:
        for i, entries in enumerate(r["rounds"], 1):
            for name, entry in entries.items():
                memory = f"{entry['rss_anon_bytes'] / 1e6:,.0f} MB" if "rss_anon_bytes" in entry else ""
                size = f"{r['checkpoint']['gigabytes']} GB"
                speed, ratio = f"{entry['gb_per_second']:.2f} GB/s", f"{entry['ratio_to_cp']:.2f}"
                rows.append((size, str(i), name, speed, ratio, memory, runs.number(r)))
    return _table(("checkpoint", "round", "what", "rate", "of cp's", "anonymous memory", "run"), rows)
