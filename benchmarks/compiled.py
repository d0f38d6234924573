"""Compiles 132B with the real compilers: memory, HBM traffic and collectives of each device.

    python -m benchmarks.compiled [CASE ...]

Needs the extra [compile] and no accelerator. A case is devices, weights, rows and positions, such as
h200-1,int8,4,8192; CASES are compiled by default. Compiles a decode step with all positions live, and a prefill chunk
of 2048 tokens. Updates these cases in results/compiled.json and prints them as a Markdown table.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.record import RESULTS, stamp, write

CASES = (
    "h200-1,int8,4,8192",
    "h200-1,int4,8,32768",
    "v5e-16,int8,64,4096",
    "v6e-8,int8,64,4096",
    "v6e-8,int4,64,4096",
    "v5e-64,bfloat16,8,32768",
    "v5p-16,bfloat16,8,32768",
    "h100-8,bfloat16,8,32768",
)
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "flax")


def plan(case: str) -> dict:
    """Runs `dbrx-jax plan --compile` for a case; returns its JSON."""
    target, dtype, batch, context = case.split(",")
    program = [sys.executable, "-c", "from dbrx_jax.cli.main import main; main()", "plan", "132b-instruct"]
    weights = [] if dtype == "bfloat16" else ["--quantization", dtype]
    options = ["--on", target, *weights, "--batch", batch, "--context", context, "--compile", "--json"]
    done = subprocess.run([*program, *options], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout)


def line(p: dict) -> str:
    """Returns the table's cells of one compiled program."""
    cells = (
        p["program"],
        f"{p['compile_seconds']} s",
        f"{p['total'] / 1e9:.2f} ({p['planned'] / 1e9:.2f})",
        f"{p['traffic'] / 1e9:.2f}",
        f"{p['traffic'] / p['least_traffic']:.3f}",
        f"{p['moved'] / 1e6:.1f} ({p['planned_moved'] / 1e6:.1f})",
    )
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=str(__doc__).splitlines()[0])
    parser.add_argument("cases", metavar="CASE", nargs="*", help=f"such as {CASES[0]}; by default all")
    asked = parser.parse_args().cases
    path = RESULTS / "compiled.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    print("| case | program | compiled in | memory, GB (planned) | traffic, GB | of least | sent, MB (planned) |")
    print("|---|---|---|---|---|---|---|")
    for case in asked or CASES:
        cases[case] = {**stamp(*PACKAGES), "compiled": plan(case)["compiled"]}
        for p in cases[case]["compiled"]:
            print(f"| {case.replace(',', ', ')} | {line(p)} |", flush=True)
        write({"model": "132b-instruct; chunks of 2048 tokens", "cases": cases}, path)


if __name__ == "__main__":
    main()
