"""The smallest slice of each kind of accelerator that holds 132B, on paper, as a table in Markdown.

    python -m benchmarks.slices

Writes results/slices.json. See dbrx_jax.planning.plan for what is counted.
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
    what = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.slices", description=what).parse_args()
    config = DbrxConfig.from_name("132b-instruct")
    rows = []
    for kind, target in TARGETS.items():
        sizes = tuple(n * target.devices_per_chip for n in slice_sizes(kind))
        for precision in PRECISIONS:
            row: dict[str, Any] = {"kind": kind, "precision": precision, "batch": BATCH}
            for context in CONTEXTS:
                found = smallest(config, target, precision, BATCH, context, sizes)
                if found is not None:
                    row[str(context)] = {
                        "devices": found.devices,
                        "axes": dict(found.axes),
                        "gigabytes": round(memory(found).total / 1e9, 1),
                        "roofline_tokens_per_second": round(decode_roofline(found).tokens_per_second),
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
