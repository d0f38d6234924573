"""Counts the collectives of a decode step of 132B in the compiled program, and what runs beside them.

    python -m benchmarks.decode_collectives [CASE]

Needs the extra [compile] and no accelerator. A case is devices, weights, rows and positions, by default CASE. Writes
results/decode_collectives.json and prints a Markdown table. Bytes are those that one device sends in ring algorithms;
steps are messages one after the other on a ring: 2 (n - 1) of an all-reduce of n devices, n - 1 of others.
"""

import argparse
import collections
import json
from typing import Any

import jax

from benchmarks.record import RESULTS, stamp, write
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning import hlo
from dbrx_jax.planning.compile import compile_decode
from dbrx_jax.planning.hlo.cost import cost
from dbrx_jax.planning.hlo.running import COLLECTIVES, Scope, entry_scope, running
from dbrx_jax.planning.plan import Setting, decode_roofline, suggest_axes_on
from dbrx_jax.planning.sizes import parse_devices

CASE = "v5e-64,bfloat16,1,4096"
PACKAGES = ("jax", "libtpu", "flax")


def setting_of(case: str) -> Setting:
    """Parses a case."""
    devices, precision, rows, positions = case.split(",")
    target, number = parse_devices(devices)
    config = DbrxConfig.from_name("132b-instruct")
    return Setting(config, target, suggest_axes_on(config, target, number), precision, int(rows), int(positions))


def prefetched_bytes(scope: Scope) -> dict[str, int]:
    """Returns for each collective of a computation the bytes of the copies from HBM that run meanwhile."""
    instructions = list(scope.computation.instructions.values())
    index = {instr.name: i for i, instr in enumerate(instructions)}
    copies = []
    for instr in instructions:
        if instr.opcode in ("copy-start", "slice-start"):
            ends = [index[user.name] for user in scope.computation.users.get(instr.name, ()) if user.name in index]
            if ends:
                copies.append((index[instr.name], min(ends), cost(scope, instr).read))
    return {
        instr.name: sum(size for start, end, size in copies if start < index[instr.name] < end)
        for instr in instructions
        if instr.opcode.removesuffix("-start") in COLLECTIVES
    }


def count(text: str) -> list[dict[str, Any]]:
    """Returns kinds of collectives of a program, those in each layer's blocks together, with their number."""
    groups: dict[tuple[str, str, int, float], int] = collections.Counter()
    for c in hlo.collectives(text):
        where = "layers" if "/block_" in c.op_name else "rest"
        groups[where, c.kind, c.group_size, hlo.bytes_moved(c)] += c.runs
    found = []
    for (where, kind, devices, moved), runs in groups.items():
        steps = (2 if kind == "all-reduce" else 1) * (devices - 1)
        row = {"where": where, "kind": kind, "devices": devices, "runs": runs, "bytes_each": round(moved)}
        found.append({**row, "bytes": round(runs * moved), "steps": runs * steps})
    return found


def analyse(case: str) -> dict[str, Any]:
    """Compiles the decode step of a case; returns its collectives, and whether other work overlaps with them."""
    setting = setting_of(case)
    text = compile_decode(setting).as_text()
    scopes = {}
    opcodes: collections.Counter[str] = collections.Counter()
    for scope, instr, runs in running(entry_scope(text), {}):
        if instr.opcode.removesuffix("-start") in COLLECTIVES:
            scopes[id(scope.computation)] = scope
            opcodes["asynchronous" if instr.opcode.endswith("-start") else "synchronous"] += runs
        elif instr.opcode == "fusion":
            body = scope.module.fusion_body(instr).values()
            opcodes["asynchronous"] += runs * sum(op.target == "AsyncCollectiveStart" for op in body)
    beside = [size for scope in scopes.values() for size in prefetched_bytes(scope).values()]
    found, roofline = count(text), decode_roofline(setting)
    assert roofline.seconds_reading is not None
    return {
        "synchronous": opcodes["synchronous"],
        "asynchronous": opcodes["asynchronous"],
        "collectives": found,
        "bytes": sum(row["bytes"] for row in found),
        "steps": sum(row["steps"] for row in found),
        "collectives_beside_copies": sum(size > 0 for size in beside),
        "bytes_copied_beside": sum(beside) // max(sum(size > 0 for size in beside), 1),  # of each such collective
        "microseconds_reading": round(roofline.seconds_reading * 1e6),
        "microseconds_sending": round((roofline.seconds_sending or 0) * 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_collectives", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("case", metavar="CASE", nargs="?", default=CASE)
    case = parser.parse_args().case
    jax.config.update("jax_platforms", "cpu")  # other plugins search for devices at length
    path = RESULTS / "decode_collectives.json"
    cases = json.loads(path.read_text()) if path.exists() else {}
    cases[case] = {**stamp(*PACKAGES), **analyse(case)}
    write(cases, path)
    print("| | kind | devices | a step | bytes each | bytes sent | messages in a row |")
    print("|---|---|---|---|---|---|---|")
    for row in cases[case]["collectives"]:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    print(json.dumps({key: value for key, value in cases[case].items() if key != "collectives"}, indent=2))


if __name__ == "__main__":
    main()
