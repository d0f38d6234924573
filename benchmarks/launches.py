"""Counts the kernels of a layer in the compiled decode step of 132B on an H200.

    python -m benchmarks.launches [CASE ...] [--list]

Needs the extra [compile] and no accelerator. A case is weights, rows and the dtype of the cache, such as
int4,1,bfloat16; CASES are compiled by default. Models of 1 and 3 layers are compiled; half of the difference of their
kernels is a layer's. With --list the kernels of the middle layer are printed, each with the operation that it comes
from. Updates these cases in results/launches.json.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax

from benchmarks.record import RESULTS, stamp, write
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning.compile import compile_decode
from dbrx_jax.planning.hlo import Launch, launches
from dbrx_jax.planning.plan import Setting, suggest_axes_on
from dbrx_jax.planning.sizes import parse_devices

CASES = ("int4,1,bfloat16", "int8,1,bfloat16", "bfloat16,1,bfloat16", "int4,1,int8", "int4,8,bfloat16")
PACKAGES = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
POSITIONS = 8192
EXPERTS = "/decode_experts/"  # in the op_name of what belongs to the experts' kernels


def decode_launches(case: str, layers: int) -> list[Launch]:
    """Returns the kernels of the compiled decode step of a model with so many layers."""
    weights, rows, cache_dtype = case.split(",")
    config = dataclasses.replace(DbrxConfig.from_name("132b-instruct"), n_layers=layers)
    target, devices = parse_devices("h200-1")
    axes = suggest_axes_on(config, target, devices)
    setting = Setting(config, target, axes, weights, int(rows), POSITIONS, cache_dtype)
    return launches(compile_decode(setting).as_text())


def middle_layer(found: list[Launch]) -> list[Launch]:
    """Returns the kernels of the second of three layers; one whose origin is not known belongs to that before it."""
    kernels, inside = [], False
    for launch in found:
        block = re.search(r"/block_(\d+)/", launch.op_name)
        inside = block[1] == "1" if block else inside and not launch.op_name
        if inside:
            kernels.append(launch)
    return kernels


def measure(case: str) -> dict[str, Any]:
    """Compiles a case; returns the kernels of a layer."""
    one, three = (decode_launches(case, layers) for layers in (1, 3))
    kernels = middle_layer(three)
    return {
        "a_layer": (len(three) - len(one)) / 2,
        "of_experts": sum(EXPERTS in kernel.op_name for kernel in kernels),
        "outside_layers": len(one) - (len(three) - len(one)) / 2,
        "kernels": [f"{k.opcode} {k.result} {k.op_name.rpartition('/block_1/')[2]}" for k in kernels],
    }


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # else plugins warn of missing devices
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=str(__doc__).splitlines()[0])
    parser.add_argument("cases", metavar="CASE", nargs="*", help=f"such as {CASES[0]}; by default all")
    parser.add_argument("--list", action="store_true", help="print the kernels of a layer")
    parser.add_argument("--output", type=Path, default=RESULTS / "launches.json", help="JSON to update")
    parsed = parser.parse_args()
    path = parsed.output
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    print("| weights, rows, cache | kernels a layer | of experts | outside layers |\n|---|---|---|---|")
    for case in parsed.cases or CASES:
        found = measure(case)
        cases[case] = {**stamp(*PACKAGES), **found}
        counts = found["a_layer"], found["of_experts"], found["outside_layers"]
        print(f"| {case} | {' | '.join(map(str, counts))} |", flush=True)
        if parsed.list:
            print("\n".join(found["kernels"]), flush=True)
        write({"model": "132b-instruct", "positions": POSITIONS, "cases": cases}, path)


if __name__ == "__main__":
    main()
