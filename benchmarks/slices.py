"""Computes the smallest slice of each kind of accelerator that holds 132B, as a Markdown table.

    python -m benchmarks.slices

Writes results/slices.json. dbrx_jax.planning.plan documents the estimate.
"""

import argparse
from typing import Any

from benchmarks.record import RESULTS, write
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning.plan import decode_roofline, memory, smallest
from dbrx_jax.planning.targets import TARGETS, slice_sizes

BATCH = 8
CONTEXTS = (4096, 32768)
PRECISIONS = ("bfloat16", "int8", "int4")


def main() -> None:
    description = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.slices", description=description).parse_args()
    config = DbrxConfig.from_name("132b-instruct")
    rows = []
    for kind, target in TARGETS.items():
        sizes = tuple(n * target.devices_per_chip for n in slice_sizes(kind))
        for precision in PRECISIONS:
            row: dict[str, Any] = {"kind": kind, "precision": precision, "batch": BATCH}
            for context in CONTEXTS:
                setting = smallest(config, target, precision, BATCH, context, sizes)
                if setting is not None:
                    row[str(context)] = {
                        "devices": setting.devices,
                        "axes": dict(setting.axes),
                        "gigabytes": round(memory(setting).total / 1e9, 1),
                        "roofline_tokens_per_second": round(decode_roofline(setting).tokens_per_second),
                    }
            rows.append(row)
    write(rows, RESULTS / "slices.json")
    print("| devices | " + " | ".join(f"{p}, {c // 1024}k" for p in PRECISIONS for c in CONTEXTS) + " |")
    print("|---" * (1 + len(PRECISIONS) * len(CONTEXTS)) + "|")
    for kind in TARGETS:
        cells = [
            f"{cell['devices']} ({cell['gigabytes']})" if (cell := row.get(str(context))) else "none"
            for row in rows
            if row["kind"] == kind
            for context in CONTEXTS
        ]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
