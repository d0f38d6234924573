"""Options: base class of the commands that compare engines. It runs all rounds and writes the result file."""

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

BUSY = 0.3  # load per CPU above which a warning is printed
CHECKED_PROMPT = 12  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all comparisons share."""

    model: str = "demo"
    """demo, bench (random weights), another configuration's name, or a Hugging Face folder."""
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "bfloat16"
    """Dtype of the weights."""
    against: Literal["transformers", "llama.cpp", "bfloat16"] | None = None
    """Peer to measure in turn with dbrx_jax; bfloat16 is dbrx_jax itself without quantised weights."""
    against_python: Path | None = None
    """Python of its virtual environment; by default what DBRX_TRANSFORMERS_PYTHON or DBRX_LLAMA_PYTHON names."""
    rounds: int = 5
    """Measurements of each engine, after one warm-up."""
    folder: Path | None = None
    """Folder for random checkpoints and GGUF files; the user's cache folder by default."""
    output: Path | None = None
    """JSON to write; by default a file in benchmarks/results that is named after the run."""

    def run(self) -> None:
        """Measures all rounds, prints and writes the result."""
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
            print_status(f"benchmarks: warning: the machine is busy (load {load:.1f} per CPU); figures will be too low")
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
        """Returns all rounds' figures, the engines' versions and the check that they agree."""
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
        """Returns the options that are the subclass' own."""
        shared = {field.name for field in dataclasses.fields(Options)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shared}

    def positions(self) -> int:
        """Returns the number of positions that a row needs."""
        return 1

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        """Returns the machine's bounds by the names of the figures."""
        raise NotImplementedError

    def ask(self, engine: Engine, number: int, config: DbrxConfig, machine: Machine) -> Figures:
        """Measures an engine in one round and returns its figures; round 0 is a warm-up."""
        raise NotImplementedError

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value <= 0:
                raise BenchmarkError(f"--{field.name}: expected a whole number above 0, got {value}")


def random_prompts(config: DbrxConfig, seed: int, rows: int, length: int) -> list[list[int]]:
    """Returns random token ids (rows, length), the same for every engine of a round."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).tolist()


def file_name(result: dict[str, Any]) -> str:
    """Returns the file name of a result, such as decode-bench-bfloat16-b8-transformers."""
    parts = [result["benchmark"], result["model"], result["dtype"]]
    if "batch" in result:
        parts.append(f"b{result['batch']}")
    if result.get("prefill_budget"):
        parts.append(f"budget{result['prefill_budget']}")
    return "-".join([*parts, result["against"] or "alone"])
