"""What the real compilers make of 132B: memory, HBM traffic and collectives of each device.

    python -m benchmarks.compiled [v5e-64 v6e-16 v5p-4 h100-8]

Needs the extra [compile] and no accelerator. A decode step of 64 rows with 4096 positions each, and a chunk
of 2048 tokens of one prompt, in bfloat16. Puts results/compiled.json in step for these targets (all by
default) and prints them as a table in Markdown.
"""

import json
import subprocess
import sys

from benchmarks.record import RESULTS, stamp, write

TARGETS = ("v5e-64", "v6e-16", "v5p-4", "h100-8")
ARGUMENTS = ("--batch", "64", "--context", "4096", "--compile", "--json")
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "flax")


def plan(target: str) -> dict:
    """The plan of 132B on a target, compiled."""
    program = [sys.executable, "-c", "from dbrx_jax.cli import main; main()", "plan", "132b-instruct", "--on", target]
    done = subprocess.run([*program, *ARGUMENTS], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{target}: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout)


def line(p: dict) -> str:
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
    path = RESULTS / "compiled.json"
    results = json.loads(path.read_text())["targets"] if path.exists() else {}
    print("| devices | program | compiled in | memory, GB (planned) | traffic, GB | of least | sent, MB (planned) |")
    print("|---|---|---|---|---|---|---|")
    for target in sys.argv[1:] or TARGETS:
        results[target] = plan(target)
        for p in results[target]["compiled"]:
            print(f"| {target} | {line(p)} |", flush=True)
    model = "132b-instruct, bfloat16, 64 rows, 4096 positions; chunks of 2048 tokens"
    write({**stamp(*PACKAGES), "model": model, "targets": results}, path)


if __name__ == "__main__":
    main()
