"""Starts engines as worker processes and sends them one request at a time, which workers/serve.py answers."""

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
WIDE = "bfloat16"  # the peer of quantised weights that is dbrx_jax itself with bfloat16 weights


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation to compare with, in a virtual environment of its own."""

    module: str  # of its worker
    variable: str  # environment variable with the path of its Python
    dtypes: tuple[str, ...]
    install: str  # arguments of pip install


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
    """An engine to start and the checkpoint that it loads."""

    name: str
    python: str
    module: str  # of its worker
    source: Path
    dtype: str  # of the weights


class Engine:
    """A running worker process."""

    def __init__(self, subject: Subject, process: subprocess.Popen[str], stderr: IO[str]):
        self.name = subject.name
        self._subject, self._process, self._stderr = subject, process, stderr

    def load(self) -> dict[str, Any]:
        """Loads the checkpoint; returns seconds, anonymous_bytes (the peak) and versions."""
        return self.ask("load", folder=str(self._subject.source), dtype=self._subject.dtype)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and returns the reply.

        Raises:
          BenchmarkError: the worker failed; the message has the last line that it printed.
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
            self._stderr.seek(0)
            printed = [text for text in self._stderr.read().splitlines() if text.strip()]
            raise BenchmarkError(f"{self.name}: the worker ended ({printed[-1] if printed else 'without output'})")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}")
        return reply


@contextlib.contextmanager
def started(subject: Subject) -> Iterator[Engine]:
    """Starts an engine's worker, and kills it when the block ends.

    Raises:
      BenchmarkError: its Python cannot be run.
    """
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        try:
            process = subprocess.Popen(
                [subject.python, "-m", subject.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                text=True,
            )
        except OSError as error:
            raise BenchmarkError(f"{subject.name}: {subject.python} cannot be run ({error.strerror})") from None
        stack.enter_context(process)
        stack.callback(process.kill)  # before Popen's exit waits for it; it has nothing to save
        yield Engine(subject, process, stderr)


def ours(folder: Path, dtype: str, name: str = OURS) -> Subject:
    """Returns dbrx_jax, in this Python, as an engine."""
    return Subject(name, sys.executable, "benchmarks.workers.ours", folder, dtype)


def peer(against: str, given: Path | None, dtype: str, folder: Path, gguf: Path) -> Subject:
    """Returns a peer that loads the checkpoint's folder, or for llama.cpp a GGUF of it, which is made if necessary.

    Raises:
      BenchmarkError: its Python cannot be found, the peer does not support the dtype, or the GGUF cannot be made.
    """
    if against == WIDE:
        if dtype == WIDE:
            raise BenchmarkError(f"--against {WIDE}: is what --dtype says; choose another for either")
        return ours(folder, WIDE, WIDE)
    python = find_python(against, given, dtype)
    if against == "llama.cpp":
        origins = folder / "config.json", ROOT / "benchmarks" / "gguf_file.py"
        if not gguf.exists() or gguf.stat().st_mtime < max(file.stat().st_mtime for file in origins):
            print_status(f"Making {gguf}")
            gguf.parent.mkdir(parents=True, exist_ok=True)
            command: list[str | Path] = [python, "-m", "benchmarks.gguf_file", folder, gguf, "--dtype", dtype]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise BenchmarkError(f"{gguf}: {(done.stderr.splitlines() or ['could not be made'])[-1]}")
        folder = gguf
    return Subject(against, python, PEERS[against].module, folder, dtype)


def find_python(against: str, given: Path | None, dtype: str) -> str:
    """Returns the path of a peer's Python.

    Raises:
      BenchmarkError: none is named, it does not exist, or the peer does not support the dtype.
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
