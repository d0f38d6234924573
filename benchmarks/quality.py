"""Measures the cost of quantised weights: the demo's predictions on held-out text, and bytes.

    apt-get download python3.11-doc wordnet-base      # in a folder CORPUS, see examples/demo_corpus.py
    for package in *.deb; do dpkg -x "$package" .; done
    python -m benchmarks.quality --corpus CORPUS [--convert FOLDER]

Half of the tokens are documentation and half chats that the demo was not trained on, in windows of its training
length. Each format is run with activations in bfloat16, the default, and in float32; the reference is the checkpoint
in float32. --convert also measures time and memory of quantising a larger checkpoint of random weights.
"""

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.checkpoints import write_random
from benchmarks.record import RESULTS, ROOT, BenchmarkError, stamp, write
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.checkpoint.orbax import PARAMS, STATE
from dbrx_jax.checkpoint.parameters import parameter_specs, parameters_of
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status, run
from dbrx_jax.demo import source_folder
from dbrx_jax.quantization import Quantization
from dbrx_jax.quantization.array import group_count
from dbrx_jax.text.tokenizer import DbrxTokenizer

FORMATS = ("int8", "fp8", "int4", "int4-64", "int4-32", "experts=int4")
WINDOW = 256  # tokens, as in training
HELD_OUT = 0.02  # of the pages and of the chats, as in examples/train_demo.py
BATCH = 8  # windows

# Runs in a process of its own, whose peak memory is that of the conversion alone.
CONVERT = """
import json, os, sys, time
from benchmarks.workers.serve import Peak
what, format, source, destination = sys.argv[1:]
format = None if format == "none" else format
from dbrx_jax import DbrxForCausalLM
from dbrx_convert.to_orbax import to_orbax
with Peak() as peak:
    begin, used = time.perf_counter(), time.process_time()
    if what == "load":
        model = DbrxForCausalLM.from_pretrained(source, quantization=format)
    else:
        to_orbax(source, destination, quantization=format)
        os.sync()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "rss_anon_before": peak.before, "rss_anon_most": peak.most}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """KL divergence, perplexity, top-1 agreement and bytes of each quantisation."""

    corpus: Path
    """Folder with the unpacked packages of the demo's corpus."""
    tokens: int = 8192
    """Token ids to predict."""
    convert: Path | None = None
    """Folder in which a checkpoint of 1.5 GB is made, quantised and removed."""
    output: Path = RESULTS / "quality.json"
    """JSON to write."""

    def run(self) -> None:
        """Measures all formats, writes the result and prints a table."""
        if self.tokens < 4 * WINDOW:
            raise BenchmarkError(f"--tokens: expected {4 * WINDOW} at least, got {self.tokens}")
        rows = held_out(self.corpus, self.tokens)
        reference = log_probabilities(DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32"), rows)
        result: dict[str, Any] = {
            **stamp("dbrx-jax", "jax", "flax", "orbax-checkpoint"),
            "text": "half held-out pages of Python 3.11's documentation, half held-out chats made of WordNet 3.0",
            "tokens": rows.size - len(rows),
            "weights": [measure(format, rows, reference) for format in (None, *FORMATS)],
        }
        if self.convert is not None:
            result["conversion"] = conversions(self.convert / "dbrx-quality")
        write(result, self.output)
        print("\n".join(table(result)), flush=True)
        print_status(f"Written to {self.output}")


def held_out(corpus: Path, tokens: int) -> np.ndarray:
    """Returns windows (N, WINDOW + 1) of the pages and chats that examples/train_demo.py held out.

    Raises:
      BenchmarkError: the corpus is missing, or differs from the demo's.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    from demo_corpus import chats, documents

    try:
        pages, pairs = documents(corpus), chats(corpus)
    except SystemExit as error:
        raise BenchmarkError(str(error)) from None
    rng = random.Random(0)
    rng.shuffle(pages)
    rng.shuffle(pairs)
    pages, pairs = (texts[: math.ceil(len(texts) * HELD_OUT)] for texts in (pages, pairs))
    figures = json.loads((source_folder() / "training.json").read_text())
    if (len(pages), len(pairs)) != (figures["held_out_documents"], figures["held_out_chats"]):
        raise BenchmarkError(f"{corpus}: not the corpus that the demo was trained on")
    tokenizer = DbrxTokenizer.from_pretrained(source_folder())
    assert tokenizer.eos_token_id is not None
    stop, roles = [tokenizer.eos_token_id], ("user", "assistant")
    streams = (
        (tokenizer.encode(page) + stop for page in pages),
        (
            tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in zip(roles, p, strict=True)]) + stop
            for p in pairs
        ),
    )
    return np.concatenate([_windows(stream, tokens // WINDOW // 2) for stream in streams])


def _windows(texts: Any, count: int) -> np.ndarray:
    """Cuts texts of token ids into `count` windows, of which each begins with the last token of the one before."""
    ids: list[int] = []
    for text in texts:
        if len(ids) > count * WINDOW:
            break
        ids += text
    if len(ids) <= count * WINDOW:
        raise BenchmarkError(f"--tokens: half of the held-out text has only {len(ids)} tokens; ask for fewer")
    return np.stack([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)])


def log_probabilities(model: DbrxForCausalLM, rows: np.ndarray) -> np.ndarray:
    """Returns log-probabilities of the next token (N, WINDOW, V), computed in float64, as float32."""
    parts = []
    for start in range(0, len(rows), BATCH):
        x = np.asarray(model(rows[start : start + BATCH, :-1]), np.float64)
        x -= x.max(-1, keepdims=True)
        parts.append((x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32))
    return np.concatenate(parts)


def measure(format: str | None, rows: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Measures one quantisation, or the weights unquantised."""
    quantization = Quantization.parse(format)
    entry: dict[str, Any] = {"weights": format or "not quantised"}
    for dtype in ("bfloat16", "float32"):
        model = DbrxForCausalLM.from_pretrained(source_folder(), dtype=dtype, quantization=quantization)
        if dtype == "bfloat16":
            leaves = jax.tree.leaves(parameters_of(model))
            entry |= sizes(quantization, sum(leaf.nbytes for leaf in leaves))
        entry[f"activations_{dtype}"] = compare(reference, log_probabilities(model, rows), rows[:, 1:])
    return entry


def compare(p: np.ndarray, q: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns KL(p || q), perplexity and top-1 agreement of log-probabilities q with the reference p."""
    kl = (np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)).sum(-1)
    target_log_probs = np.take_along_axis(q, targets[..., None], -1)
    return {
        "kl_nats": float(kl.mean()),
        "kl_nats_99_percent": float(np.quantile(kl, 0.99)),
        "perplexity": float(np.exp(-target_log_probs.mean(dtype=np.float64))),
        "top_1": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def sizes(quantization: Quantization | None, in_memory: int) -> dict[str, Any]:
    """Returns the bytes of the weights in memory, on disk and computed from shapes, with scales in bfloat16."""
    with tempfile.TemporaryDirectory() as temporary:
        to_orbax(source_folder(), Path(temporary) / "out", quantization=quantization)
        files = [f for f in (Path(temporary) / "out" / PARAMS / STATE).rglob("*") if f.is_file()]
        on_disk = sum(f.stat().st_size for f in files if f.name[0].isdigit())
        metadata = sum(f.stat().st_size for f in files if not f.name[0].isdigit())
    expected = expected_bytes(DbrxConfig.from_file(source_folder()), quantization)
    return {
        "bytes_in_memory": in_memory,
        "bytes_on_disk": on_disk,
        "bytes_of_array_headers": metadata,
        "bytes_expected": expected,
        "memory_ratio": in_memory / expected,
        "disk_ratio": on_disk / expected,
    }


def expected_bytes(config: DbrxConfig, quantization: Quantization | None) -> int:
    """Returns the bytes that follow from the shapes: 2 for a plain weight, 1 or 1/2 for a quantised one, 2 a scale."""
    total = 0
    for name, spec in parameter_specs(config).items():
        format = None if quantization is None else quantization.format_of(name)
        if format is None:
            total += 2 * spec.size
            continue
        contracted = math.prod(spec.shape[d] for d in spec.contracted)
        scales = spec.size // contracted
        if format.group is not None:
            length = spec.shape[spec.contracted[-1]]
            scales = spec.size // length * group_count(length, format.group)
        total += spec.size // (2 if format.kind == "int4" else 1) + 2 * scales
    return total


def conversions(work: Path) -> dict[str, Any]:
    """Measures seconds and peak anonymous memory of quantising a random checkpoint in conversion and loading."""
    shutil.rmtree(work, ignore_errors=True)
    base = DbrxConfig.from_name("demo")
    config = dataclasses.replace(
        base, d_model=2048, n_heads=16, kv_n_heads=4, ffn_hidden_size=3584, n_layers=2, max_seq_len=2048
    )
    size = 2 * config.total_parameters
    rows = []
    try:
        write_random(config, work / "source")
        for what, format in (("to-orbax", "none"), ("to-orbax", "int4"), ("to-orbax", "int8"), ("load", "int8")):
            shutil.rmtree(work / "out", ignore_errors=True)
            command: list[Any] = [sys.executable, "-c", CONVERT, what, format, work / "source", work / "out"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise BenchmarkError(f"{what} {format}: {(done.stderr.splitlines() or ['failed'])[-1]}")
            figures = json.loads(done.stdout.splitlines()[-1])
            row = {"what": what, "quantization": format, **figures, "gb_per_second": size / figures["seconds"] / 1e9}
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    weight = config.d_model * config.ffn_hidden_size
    return {"parameters": config.total_parameters, "bytes": size, "bytes_of_an_expert_weight": 2 * weight, "runs": rows}


def table(result: dict[str, Any]) -> list[str]:
    """Returns the Markdown table of docs/quantization.md."""
    lines = [
        "| weights | KL, nats | KL, float32 activations | perplexity | same top token | MB in memory | expected |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["weights"]:
        half, full = entry["activations_bfloat16"], entry["activations_float32"]
        cells = (
            entry["weights"],
            f"{half['kl_nats']:.5f}",
            f"{full['kl_nats']:.5f}",
            f"{half['perplexity']:.3f}",
            f"{half['top_1']:.1%}",
            f"{entry['bytes_in_memory'] / 1e6:.2f}",
            f"{entry['bytes_expected'] / 1e6:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    run("benchmarks.quality", tyro.cli(Quality, prog="python -m benchmarks.quality", description=__doc__).run)


if __name__ == "__main__":
    main()
