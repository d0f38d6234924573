"""The command: python -m benchmarks decode|prefill|throughput|serve|load|convert|report, from the repository root."""

import os
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks.commands import Decode, Prefill, Throughput
from benchmarks.convert import Convert
from benchmarks.load import Load
from benchmarks.report import Report
from benchmarks.serve import Serve
from dbrx_jax.console import run

COMMANDS: dict[str, Callable[..., Any]] = {
    "decode": Decode,
    "prefill": Prefill,
    "throughput": Throughput,
    "serve": Serve,
    "load": Load,
    "convert": Convert,
    "report": Report,
}
DESCRIPTION = """Speed of dbrx_jax against its roofline and its peers.

Others run as python -m benchmarks.NAME:

- gpu, tiles, kernels, compiled, compiled_engine, slices, quality
- profile, products, invariance, first_token, engine_step, machine, speculation"""


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's log of the machine
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m benchmarks", description=DESCRIPTION)
    run("benchmarks", command.run)


if __name__ == "__main__":
    main()
