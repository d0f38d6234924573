"""The command load: time and memory of loading a checkpoint, against the rates of the disk and the page cache."""

import dataclasses
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare import Figures, alternate
from benchmarks.engines import Subject, started
from benchmarks.machine import Machine, best_seconds
from benchmarks.options import Options
from benchmarks.record import cpus
from dbrx_jax.config import DbrxConfig

PIECE = 16 << 20  # bytes per read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(Options):
    """Seconds and anonymous memory of loading a model from a folder, with a warm page cache.

    Every load has a process of its own; imports are not timed. llama.cpp reads its GGUF without mapping it.
    """

    def roofline(self, config: DbrxConfig, machine: Machine, source: Path) -> dict[str, Any]:
        files = weight_files(source)
        cached = read_rate(files)
        return {
            "bytes_per_second": cached,
            "disk_bytes_per_second": direct_rate(files),
            "bytes": sum(file.stat().st_size for file in files),
        }

    def measure(self, config: DbrxConfig, machine: Machine, subjects: list[Subject]) -> dict[str, Any]:
        versions: dict[str, Any] = {}

        def once(subject: Subject, number: int) -> Figures:
            size = sum(file.stat().st_size for file in weight_files(subject.source))
            with started(subject) as engine:
                reply = engine.load()
            versions[subject.name] = reply["versions"]
            return {
                "bytes_per_second": size / reply["seconds"],
                "load_seconds": reply["seconds"],
                "anonymous_bytes": float(reply["anonymous_bytes"]),
            }

        rounds = alternate(subjects, once, self.rounds)
        return {"engines": versions, "rounds": rounds}


def weight_files(source: Path) -> list[Path]:
    """Returns the files that hold a checkpoint's weights; `source` itself if it is a GGUF file."""
    return sorted(source.glob("*.safetensors")) if source.is_dir() else [source]


def read_rate(files: list[Path]) -> float:
    """Returns bytes/s of reading the files from the page cache with all CPUs, the best of three."""
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]

    def read(part: list[tuple[Path, int]]) -> None:
        buffer = bytearray(PIECE)
        for file, start in part:
            with file.open("rb", buffering=0) as f:
                f.seek(start)
                f.readinto(buffer)

    with ThreadPoolExecutor(cpus()) as pool:
        parts = [pieces[i :: cpus()] for i in range(cpus())]
        return sum(file.stat().st_size for file in files) / best_seconds(lambda: list(pool.map(read, parts)), 3)


def direct_rate(files: list[Path]) -> float | None:
    """Returns bytes/s of one read of the largest file with O_DIRECT; None if the file system has no such reads."""
    file = max(files, key=lambda f: f.stat().st_size)
    buffer = mmap.mmap(-1, PIECE)  # aligned, as O_DIRECT requires
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        begin, size = time.perf_counter(), 0
        while count := os.preadv(descriptor, [buffer], size):
            size += count
            if count < PIECE:
                break
        return size / (time.perf_counter() - begin)
    except OSError:
        return None
    finally:
        os.close(descriptor)
