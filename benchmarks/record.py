"""Writes results as JSON files with date, machine and versions."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from dbrx_jax.errors import DbrxError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# What the speed of a CPU depends on, as Linux names it.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "bf16", "sve")


class BenchmarkError(DbrxError):
    """A benchmark's options are invalid, or an engine failed."""


def cpus() -> int:
    """Returns the number of CPUs that this process may use, which is each engine's number of threads."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """Returns processor, number of CPUs and memory as a text."""
    info = Path("/proc/cpuinfo").read_text(errors="replace")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{names[0] if names else platform.machine()}, {cpus()} CPUs, {memory / 2**30:.0f} GiB"


def instruction_sets() -> list[str]:
    """Returns those of INSTRUCTION_SETS that the processor has."""
    info = Path("/proc/cpuinfo").read_text(errors="replace")
    lines = [line.partition(":")[2].split() for line in info.splitlines() if line.startswith(("flags", "Features"))]
    return [name for name in INSTRUCTION_SETS if lines and name in lines[0]]


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of installed packages by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def stamp(*packages: str) -> dict[str, Any]:
    """Returns the first fields of every result: date, machine and its instruction sets, Python and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "instruction_sets": instruction_sets(),
        "python": platform.python_version(),
        "versions": versions(*packages),
    }


def write(result: Any, path: Path) -> None:
    """Writes a result as indented JSON; renames the file when it is complete.

    Raises:
      BenchmarkError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.incomplete")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(path)  # a killed process leaves the previous result
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be written ({error.strerror})") from None
