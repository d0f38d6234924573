"""Engines as the harness sees them: processes that are asked one thing at a time (workers/serve.py answers)."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.record import ROOT, BenchmarkError
from dbrx_jax.console import print_status

OURS = "dbrx_jax"
WIDE = "bfloat16"  # ours without quantised weights, as a peer of what has them


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation that we compare with, in a virtual environment of its own."""

    module: str  # of its worker
    variable: str  # of the environment, that names its Python
    dtypes: tuple[str, ...]
    install: str


PEERS = {
    "transformers": Peer(
        "benchmarks.workers.torch_peer",
        "DBRX_TRANSFORMERS_PYTHON",
        ("float32", "bfloat16"),
        "torch==2.13.0 transformers==4.57.6",
    ),
    "llama.cpp": Peer(
        "benchmarks.workers.llama_peer",
        "DBRX_LLAMA_PYTHON",
        ("float32", "bfloat16", "int8", "int4"),
        "--no-binary llama-cpp-python llama-cpp-python gguf",
    ),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """An engine to be started, and what it loads."""

    name: str
    python: str
    module: str  # of its worker
    source: Path
    dtype: str  # of the weights


class Engine:
    """A worker process that is running."""

    def __init__(self, subject: Subject, process: subprocess.Popen[str], notes: IO[str]):
        self.name = subject.name
        self._subject, self._process, self._notes = subject, process, notes

    def load(self) -> dict[str, Any]:
        """Loads its checkpoint: seconds, anonymous_bytes at most, versions."""
        return self.ask("load", folder=str(self._subject.source), dtype=self._subject.dtype)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to one request.

        Raises:
          BenchmarkError: the worker failed; with what it printed last.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._notes.seek(0)
            notes = [note for note in self._notes.read().splitlines() if note.strip()]
            raise BenchmarkError(f"{self.name}: the worker ended ({notes[-1] if notes else 'without a word'})")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}")
        return reply


@contextlib.contextmanager
def started(subject: Subject) -> Iterator[Engine]:
    """The engine's worker, until the block ends.

    Raises:
      BenchmarkError: its Python cannot be run.
    """
    with contextlib.ExitStack() as stack:
        notes = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        try:
            process = subprocess.Popen(
                [subject.python, "-m", subject.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=notes,
                cwd=ROOT,
                text=True,
            )
        except OSError as error:
            raise BenchmarkError(f"{subject.name}: {subject.python} cannot be run ({error.strerror})") from None
        stack.enter_context(process)
        stack.callback(process.kill)  # before it is waited for; it has nothing to save
        yield Engine(subject, process, notes)


def ours(folder: Path, dtype: str, name: str = OURS) -> Subject:
    return Subject(name, sys.executable, "benchmarks.workers.ours", folder, dtype)


def peer(against: str, given: Path | None, dtype: str, folder: Path, gguf: Path) -> Subject:
    """A peer, and what it loads: the checkpoint's folder, or for llama.cpp a GGUF of it, which is made once.

    Raises:
      BenchmarkError: its Python cannot be found, the peer has no such dtype, or the GGUF cannot be made.
    """
    if against == WIDE:
        if dtype == WIDE:
            raise BenchmarkError(f"--against {WIDE}: is what --dtype says; choose another for either")
        return ours(folder, WIDE, WIDE)
    python = find_python(against, given, dtype)
    if against == "llama.cpp":
        if not gguf.exists() or gguf.stat().st_mtime < (folder / "config.json").stat().st_mtime:
            print_status(f"Making {gguf}")
            gguf.parent.mkdir(parents=True, exist_ok=True)
            command: list[str | Path] = [python, "-m", "benchmarks.gguf_file", folder, gguf, "--dtype", dtype]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise BenchmarkError(f"{gguf}: {(done.stderr.splitlines() or ['could not be made'])[-1]}")
        folder = gguf
    return Subject(against, python, PEERS[against].module, folder, dtype)


def find_python(against: str, given: Path | None, dtype: str) -> str:
    """The interpreter of a peer's virtual environment.

    Raises:
      BenchmarkError: none is named, it is not there, or the peer has no such dtype.
    """
    known = PEERS[against]
    if dtype not in known.dtypes:
        raise BenchmarkError(f"--against {against}: has no {dtype} for DBRX; choose {' or '.join(known.dtypes)}")
    python = str(given or os.environ.get(known.variable, ""))
    if not python:
        raise BenchmarkError(
            f"--against {against}: name the Python of a virtual environment (pip install {known.install}) "
            f"with --against-python or {known.variable}"
        )
    if not os.path.isfile(python) or not os.access(python, os.X_OK):
        raise BenchmarkError(f"--against-python: {python} is not an interpreter")
    return str(Path(python).absolute())
