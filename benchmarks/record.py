"""Date, machine and versions of every result, and the folder of results."""

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


class BenchmarkError(DbrxError):
    """A benchmark was asked for what it cannot do, or an engine failed."""


def cpus() -> int:
    """CPUs that this process may use; every engine gets as many threads."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """The machine in words."""
    info = Path("/proc/cpuinfo").read_text(errors="replace")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{names[0] if names else platform.machine()}, {cpus()} CPUs, {memory / 2**30:.0f} GiB"


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def stamp(*packages: str) -> dict[str, Any]:
    """Date, machine, Python and versions: the head of every result."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(*packages),
    }


def write(result: Any, path: Path) -> None:
    """Writes a result as JSON that is read well in a diff.

    Raises:
      BenchmarkError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.incomplete")
        whole.write_text(json.dumps(result, indent=2) + "\n")
        whole.replace(path)  # so that a process killed meanwhile leaves the last result
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be written ({error.strerror})") from None
