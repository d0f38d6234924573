"""The command: python -m benchmarks.gpu [--seconds 1000] [--toy] [--part NAME]

Runs the parts in the order of PARTS, each in a process with a time limit, until the budget is spent. Checks come
first; a wrong result ends the run. Every figure is written as soon as it is known.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines import PEERS
from benchmarks.gpu import check, serve, speed
from benchmarks.gpu.sizes import FEWER_LAYERS, FULL, TOY, Size, card
from benchmarks.machine import Machine, measure
from benchmarks.record import RESULTS, ROOT, BenchmarkError, stamp, write
from dbrx_jax.console import print_status, run
from dbrx_jax.runtime import set_process_defaults

DESCRIPTION = "132B on one Hopper GPU: checks against float32 references, then rates, within a budget of seconds."
OUTPUT = RESULTS / "gpu.json"
MIN_SECONDS = 15  # least time left to start a part
WRONG = 3  # exit status of a failed check


def peer(size: Size) -> Iterator[dict[str, Any]]:
    """Measures the model of decode-bfloat16 in transformers 4.57.6, if DBRX_TRANSFORMERS_PYTHON names its Python."""
    python = os.environ.get(PEERS["transformers"].variable)
    if not python or size is not FULL:
        yield {"skipped": f"needs a GPU, and {PEERS['transformers'].variable} to name a Python with transformers"}
        return
    (batches, contexts) = zip(*size.decode["bfloat16"], strict=True)
    options = {
        "layers": FEWER_LAYERS["bfloat16"],
        "prompt": contexts[0] - size.steps,
        "tokens": size.steps,
        "batches": batches,
    }
    command = [python, str(Path(__file__).with_name("peer.py")), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise BenchmarkError(f"transformers failed with exit status {process.returncode}")


class Part(NamedTuple):
    """One process of a run: its time limit, and the function that yields its rows."""

    seconds: int
    measure: Callable[..., Iterator[dict[str, Any]]]
    needs_machine: bool = False  # `measure` also takes the device's measured rates


PARTS = {
    "device": Part(60, lambda size: speed.device()),
    "check-experts": Part(130, check.experts),
    "check-attention": Part(80, check.attention),
    "check-model": Part(110, check.model),
    "decode-int4": Part(150, partial(speed.decode, precision="int4"), True),
    "decode-bfloat16": Part(80, partial(speed.decode, precision="bfloat16"), True),
    "peer": Part(90, peer),
    "prefill-int4": Part(80, partial(speed.prefill, precision="int4"), True),
    "prefill-bfloat16": Part(60, partial(speed.prefill, precision="bfloat16"), True),
    "decode-int8": Part(100, partial(speed.decode, precision="int8"), True),
    "serve": Part(500, partial(serve.serve, precision="int4"), True),
    "load-int4": Part(300, partial(speed.load, precision="int4"), True),
}


def run_all(seconds: float, toy: bool, output: Path) -> None:
    """Runs the parts until the time is spent.

    Raises:
      BenchmarkError: a part failed; the other parts' results are written.
    """
    end = time.monotonic() + seconds
    write({"benchmark": "gpu", "toy": toy, **stamp("dbrx-jax", "jax", "jaxlib", "flax")}, output)
    failed = []
    for name, part in PARTS.items():
        left = end - time.monotonic()
        if left < MIN_SECONDS:
            _add(output, name, {"skipped": "no time was left"})
            continue
        limit = min(part.seconds, left)
        print_status(f"{name}: at most {limit:.0f} of {left:.0f} seconds ...")
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--output", str(output)]
        try:
            status = subprocess.run(command + ["--toy"] * toy, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            _add(output, name, {"failed": f"not done after {limit:.0f} s"})
            failed.append(name)
            continue
        if status == WRONG:
            raise BenchmarkError(f"{name}: wrong results, so nothing is timed")
        if status:
            _add(output, name, {"failed": f"exit status {status}"})
            failed.append(name)
    if failed:
        raise BenchmarkError(f"not done: {', '.join(failed)}; the rest is in {output}")


def run_part(name: str, size: Size, output: Path) -> None:
    """Runs one part in this process and writes each row to the file."""
    if size is FULL:
        card()  # raises if the GPU is not Hopper
    if name == "reference-model":
        check.write_reference_model(size, output)
        return
    if not output.exists():
        write({"benchmark": "gpu", "toy": size is TOY, **stamp("dbrx-jax", "jax", "jaxlib", "flax")}, output)
    try:
        part = PARTS[name]
        arguments = [_machine(output)] if part.needs_machine else []
        for row in part.measure(size, *arguments):
            print_status(json.dumps(row))
            _add(output, name, row)
    except check.WrongResult as error:
        print_status(f"{name}: {error}")
        _add(output, name, {"failed": str(error)})
        sys.exit(WRONG)


def _machine(output: Path) -> Machine:
    """Returns the device's rates, from the part "device" if it has run."""
    rows = json.loads(output.read_text()).get("device", [{}])
    return rows[0].get("measured") or measure()


def _add(output: Path, name: str, row: dict[str, Any]) -> None:
    result = json.loads(output.read_text())
    result.setdefault(name, []).append(row)
    write(result, output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=DESCRIPTION)
    parser.add_argument("--seconds", type=float, default=1000, help="for the whole run; 1000 by default")
    parser.add_argument("--toy", action="store_true", help="a tiny model on any device, without the peer")
    parser.add_argument("--part", choices=[*PARTS, "reference-model"], help="run only this part, without a limit")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON to write")
    options = parser.parse_args()
    set_process_defaults()
    if options.part:
        size = TOY if options.toy else FULL
        run("benchmarks.gpu", lambda: run_part(options.part, size, options.output))
    run("benchmarks.gpu", lambda: run_all(options.seconds, options.toy, options.output))


if __name__ == "__main__":
    main()
