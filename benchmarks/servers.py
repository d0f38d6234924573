"""Starts the measured HTTP servers: dbrx-jax serve and llama-server, with the same model and as many rows."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.engines import OURS
from benchmarks.record import BenchmarkError, cpus
from benchmarks.users import free_port
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status

START_SECONDS = 600  # for loading and compiling
POLL_SECONDS = 0.2
LLAMA_SERVER = "DBRX_LLAMA_SERVER"  # environment variable with the path of llama-server


class Server(NamedTuple):
    """A running server."""

    name: str
    port: int


@contextlib.contextmanager
def serve(
    source: Path, folder: Path, dtype: str, rows: int, positions: int, prefill_budget: int | None, log: Path
) -> Iterator[Server]:
    """Runs dbrx-jax serve.

    Args:
      source: of the checkpoint.
      folder: for the same files, with a vocabulary.
      positions: of a row.
      prefill_budget: of --prefill-budget; None leaves it out.
      log: gets what it prints.
    """
    config = DbrxConfig.from_file(source)
    port = free_port()
    arguments = [str(with_vocabulary(source, folder, config.vocab_size)), "--port", str(port), "--max-rows", str(rows)]
    arguments += ["--cache-gb", f"{cache_gb(config, dtype, rows * positions):.6f}"]
    if prefill_budget is not None:
        arguments += ["--prefill-budget", str(prefill_budget)]
    kind = ["--quantization", dtype] if dtype in ("int8", "int4") else ["--dtype", dtype]
    program = Path(sys.executable).parent / "dbrx-jax"
    with _running(OURS, [str(program), "serve", *arguments, *kind], port, log) as server:
        yield server


@contextlib.contextmanager
def llama_server(program: Path, gguf: Path, dtype: str, rows: int, positions: int, log: Path) -> Iterator[Server]:
    """Runs llama.cpp's server, with its defaults; in float32 without flash attention, which is not exact there.

    Args:
      positions: of a row.
      log: gets what it prints.
    """
    port, threads = free_port(), str(cpus())
    slot = -(-positions // 256) * 256
    arguments = ["-m", str(gguf), "--port", str(port), "-np", str(rows), "-c", str(rows * slot), "--load-mode", "none"]
    arguments += ["-t", threads, "-tb", threads]
    if dtype == "float32":
        arguments += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    with _running("llama-server", [str(program), *arguments], port, log) as server:
        yield server


def find_llama_server(given: Path | None) -> Path:
    """Returns the path of llama-server.

    Raises:
      BenchmarkError: none is named, or it cannot be run.
    """
    path = str(given or os.environ.get(LLAMA_SERVER, ""))
    if not path:
        raise BenchmarkError(f"--against llama-server: name the program with --llama-server or {LLAMA_SERVER}")
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise BenchmarkError(f"--llama-server: {path} is not a program")
    return Path(path).absolute()


def version_of(program: Path) -> str:
    """Returns llama-server's version."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    found = re.search(r"version: (.*)", done.stdout + done.stderr)
    return found.group(1) if found else "unknown"


@contextlib.contextmanager
def _running(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[Server]:
    """Starts a server, waits until it is healthy, and ends it after the block.

    Raises:
      BenchmarkError: it did not start; the message has its last line.
    """
    print_status(f"Starting {name}")
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            begin = time.monotonic()
            while not _is_healthy(port):
                if process.poll() is not None or time.monotonic() > begin + START_SECONDS:
                    printed = log.read_text(errors="replace").split("\n")
                    last = next((line for line in reversed(printed) if line.strip()), "without output")
                    raise BenchmarkError(f"{name}: did not start ({last:.200})")
                time.sleep(POLL_SECONDS)
            print_status(f"{name} is ready after {time.monotonic() - begin:.0f} s")
            yield Server(name, port)
        finally:
            process.terminate()


def _is_healthy(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        return answer.status == 200
    return False


def cache_gb(config: DbrxConfig, dtype: str, positions: int) -> float:
    """Returns the size of a cache of so many positions, and a block for each row more, in GB."""
    element = 4 if dtype == "float32" else 2
    return (positions + 4096) * 2 * config.n_layers * config.kv_n_heads * config.head_dim * element / 1e9


def with_vocabulary(source: Path, folder: Path, size: int) -> Path:
    """Returns a folder of the checkpoint's weights with a made-up vocabulary, whose token 300 is the text "t300,"."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in [source / "config.json", *source.glob("model*.safetensors*")]:
        _link(file, folder / file.name)
    texts = [bytes([i]) if i < 256 else f"t{i},".encode() for i in range(size - 1)]  # all bytes must be there
    lines = (f"{base64.b64encode(text).decode()} {i}\n" for i, text in enumerate(texts))
    (folder / "made_up.tiktoken").write_text("".join(lines))
    special = {"added_tokens_decoder": {str(size - 1): {"content": "<|endoftext|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "pad_token": "<|endoftext|>"}))
    return folder


def _link(file: Path, copy: Path) -> None:
    """Makes a second name of a file, or a copy where that cannot be: the server takes no symbolic links."""
    copy.unlink(missing_ok=True)
    try:
        copy.hardlink_to(file.resolve())
    except OSError:
        shutil.copy(file, copy)
