"""The command convert: rates of the converter and of loading at DBRX's true widths, relative to `cp` and sync."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import write_folder
from benchmarks.record import RESULTS, ROOT, BenchmarkError, stamp, write
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status

BLOCK = 64 << 20  # bytes of random bits per block

# Runs in a process of its own, whose peak memory is that of the conversion alone.
MEASURE = """
import json, os, sys, time
from benchmarks.workers.serve import Peak
name, source, destination = sys.argv[1:]
from dbrx_jax import DbrxForCausalLM
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
with Peak() as peak:
    begin = time.perf_counter()
    if name == "load":
        model = DbrxForCausalLM.from_pretrained(source)
    else:
        {"to-orbax": to_orbax, "to-hf": to_hf}[name](source, destination)
        os.sync()
    seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "rss_anon_bytes": peak.most}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """GB/s of the converter, both ways, and of loading, as a ratio to cp of the same files.

    Makes a random checkpoint (one layer is 6.5 GB, embedding and head 2.5 GB more), then times in turn: cp,
    to-orbax, loading, to-hf. Needs up to four times the checkpoint's size on disk.
    """

    folder: Path
    """A folder on the disk to be measured; files made in it are removed."""
    layers: int = 1
    """Layers of the checkpoint."""
    experts: int = 16
    """Experts of each layer."""
    rounds: int = 2
    """Measurements of each."""
    output: Path = RESULTS / "convert.json"
    """JSON to write."""

    def run(self) -> None:
        """Measures all rounds, prints and writes the result."""
        for name in ("layers", "experts", "rounds"):
            if getattr(self, name) < 1:
                raise BenchmarkError(f"--{name}: expected a whole number above 0, got {getattr(self, name)}")
        work = (self.folder / "dbrx-convert-benchmark").resolve()
        shutil.rmtree(work, ignore_errors=True)
        try:
            config = write_random_bits(work / "source", self.layers, self.experts)
            gigabytes = config.total_parameters * 2 / 1e9
            rounds = [self._round(work, gigabytes) for _ in range(self.rounds)]
        finally:
            shutil.rmtree(work, ignore_errors=True)
        checkpoint = {"layers": self.layers, "experts": self.experts, "gigabytes": round(gigabytes, 2)}
        head = stamp("dbrx-jax", "jax", "orbax-checkpoint")
        write({"benchmark": "convert", **head, "checkpoint": checkpoint, "rounds": rounds}, self.output)
        print_status(f"Written to {self.output}")

    def _round(self, work: Path, gigabytes: float) -> dict[str, Any]:
        row: dict[str, Any] = {"cp": {"seconds": copy(work / "source", work / "cp")}}
        shutil.rmtree(work / "cp")
        row["to-orbax"] = measure("to-orbax", work / "source", work / "orbax")
        row["load"] = measure("load", work / "orbax", work / "none")
        row["to-hf"] = measure("to-hf", work / "orbax", work / "hf")
        shutil.rmtree(work / "hf")
        shutil.rmtree(work / "orbax")
        for name, entry in row.items():
            entry["gb_per_second"] = round(gigabytes / entry["seconds"], 3)
            entry["ratio_to_cp"] = round(row["cp"]["seconds"] / entry["seconds"], 3)
            entry["seconds"] = round(entry["seconds"], 2)
            print(f"{name:<9}{entry['gb_per_second']} GB/s, {entry['ratio_to_cp']} of cp's rate", flush=True)
        return row


def write_random_bits(folder: Path, layers: int, experts: int) -> DbrxConfig:
    """Writes a checkpoint of random bfloat16 bits (absolute values below 2) in the published layout and file size."""
    base = DbrxConfig.from_name("132b-base")
    config = dataclasses.replace(base, n_layers=layers, moe_num_experts=experts, moe_top_k=min(4, experts))
    rng = np.random.default_rng(0)

    def values(name: str, size: int) -> Iterator[np.ndarray]:
        for start in range(0, size * 2, BLOCK):
            bits = rng.integers(0, 1 << 16, min(BLOCK, size * 2 - start) // 2, np.uint16) & 0xBFFF
            yield bits.view(np.uint8)

    write_folder(config, folder, values)
    return config


def copy(source: Path, destination: Path) -> float:
    """Returns the seconds of `cp -r` and sync."""
    os.sync()
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    os.sync()
    return time.perf_counter() - begin


def measure(name: str, source: Path, destination: Path) -> dict[str, float]:
    """Returns seconds and peak anonymous memory of one conversion, or of loading.

    Raises:
      BenchmarkError: the conversion failed.
    """
    os.sync()
    command: list[str | Path] = [sys.executable, "-c", MEASURE, name, source, destination]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{name}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
