"""Shared by all comparisons: options, the order of measurements, and the result file."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.checkpoints import cache_folder, checkpoint
from benchmarks.compare import Figures, alternate, check_same, summary
from benchmarks.engines import Engine, Subject, ours, peer, started
from benchmarks.machine import Machine, measure_apart
from benchmarks.record import RESULTS, BenchmarkError, cpus, stamp, write
from benchmarks.show import lines
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status

BUSY = 0.3  # load of a CPU from which on a measurement is doubtful
CHECKED_PROMPT = 12  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that the comparisons share."""

    model: str = "demo"
    """demo, bench (random weights), another configuration's name, or a Hugging Face folder."""
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "bfloat16"
    """Dtype of the weights."""
    against: Literal["transformers", "llama.cpp", "bfloat16"] | None = None
    """Measure this one too, in turn with ours; bfloat16 is ours without quantised weights."""
    against_python: Path | None = None
    """Python of its virtual environment; by default what DBRX_TRANSFORMERS_PYTHON or DBRX_LLAMA_PYTHON names."""
    rounds: int = 5
    """Measurements of each engine, after one warm-up."""
    folder: Path | None = None
    """Folder for random checkpoints and GGUF files; the user's cache folder by default."""
    output: Path | None = None
    """JSON to write; by default a file in benchmarks/results that is named after the run."""

    def run(self) -> None:
        """Measures, prints and writes."""
        self._check_numbers()
        cache, name = (self.folder or cache_folder()).resolve(), Path(self.model).resolve().name
        source = checkpoint(self.model, cache).resolve()
        config = DbrxConfig.from_file(source)
        if self.positions() > config.max_seq_len:
            raise BenchmarkError(
                f"{self.model}: has {config.max_seq_len} positions, and {self.positions()} are asked for"
            )
        subjects = [ours(source, self.dtype)]
        if self.against:
            gguf = cache / f"{name}-{self.dtype}.gguf"
            subjects.append(peer(self.against, self.against_python, self.dtype, source, gguf))
        load = os.getloadavg()[0] / cpus()
        if load > BUSY:
            print_status(f"benchmarks: warning: the machine is busy (load {load:.1f} a CPU), and measures wrongly")
        machine = measure_apart()
        result: dict[str, Any] = {
            "benchmark": type(self).__name__.lower(),
            **stamp("dbrx-jax", "jax", "jaxlib", "flax", "numpy"),
            "load_before": round(load, 2),
            "measured": machine,
            "model": name,
            "dtype": self.dtype,
            "against": self.against,
            **self.facts(),
            "roofline": self.roofline(config, machine, source),
        }
        result |= self.measure(config, machine, subjects)
        result["summary"] = summary(result["rounds"])
        print("\n".join(lines(result)), flush=True)
        path = self.output or RESULTS / f"{file_name(result)}.json"
        write(result, path)
        print_status(f"Written to {path}")

    def measure(self, config: DbrxConfig, machine: Machine, subjects: list[Subject]) -> dict[str, Any]:
        """All rounds, and what the engines report of themselves."""
        result: dict[str, Any] = {"engines": {}}
        with contextlib.ExitStack() as stack:
            engines = [stack.enter_context(started(subject)) for subject in subjects]
            for engine in engines:
                result["engines"][engine.name] = engine.load()["versions"]
            if len(engines) > 1:
                prompt = random_prompts(config, 0, 1, CHECKED_PROMPT)[0]
                result["check"] = check_same(engines[0], engines[1], prompt, self.dtype)
            result["rounds"] = alternate(engines, lambda e, n: self.ask(e, n, config, machine), self.rounds)
        return result

    def facts(self) -> dict[str, Any]:
        """The options that are this benchmark's own."""
        shared = {field.name for field in dataclasses.fields(Options)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shared}

    def positions(self) -> int:
        """Most positions of a row."""
        return 1

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        """The best that the machine allows, under the names of the figures."""
        raise NotImplementedError

    def ask(self, engine: Engine, number: int, config: DbrxConfig, machine: Machine) -> Figures:
        """Figures of a round, numbered from 1; round 0 warms up."""
        raise NotImplementedError

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value <= 0:
                raise BenchmarkError(f"--{field.name}: expected a whole number above 0, got {value}")


def random_prompts(config: DbrxConfig, seed: int, rows: int, length: int) -> list[list[int]]:
    """Token ids (rows, length), the same ones for every engine of a round."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).tolist()


def file_name(result: dict[str, Any]) -> str:
    """The name of a result, such as decode-bench-bfloat16-b8-transformers."""
    parts = [result["benchmark"], result["model"], result["dtype"]]
    if "batch" in result:
        parts.append(f"b{result['batch']}")
    return "-".join([*parts, result["against"] or "alone"])
