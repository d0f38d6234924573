"""Seconds from the command to the first generated text of the demo, and to the end: first, second and third run.

    python -m benchmarks.first_token

The first run begins with an empty cache of compiled programs. Writes results/first_token.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, stamp, write

PROMPT = "A list is"
# The command's steps in its order, with the seconds of each.
PHASES = """
import json, sys, time
begin = time.perf_counter()
phases = {}
def done(name):
    global begin
    phases[name] = round(time.perf_counter() - begin, 2)
    begin = time.perf_counter()
import jax
done("import jax")
import dbrx_jax.cli.main, dbrx_jax.generation.stream, dbrx_jax.checkpoint.load
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.runtime import enable_compilation_cache
from dbrx_jax.demo import source_folder
done("import the rest")
enable_compilation_cache(lambda line: None)
folder = source_folder()
tokenizer = DbrxTokenizer.from_pretrained(folder)
done("tokenizer")
model = DbrxForCausalLM.from_pretrained(folder)
done("weights")
stream = dbrx_jax.generation.stream.TokenStream(model, [tokenizer.encode(sys.argv[1])], max_new_tokens=128)
stream.compile()
done("trace the programs and read them compiled")
next(stream)
done("prompt and first token")
print(json.dumps(phases))
"""


def run(cache: str) -> dict[str, Any]:
    """Runs the command; returns seconds to the first byte on stdout and to the end of the process."""
    program = Path(sys.executable).parent / "dbrx-jax"
    command: list[str | Path] = [program, "generate", "--prompt", PROMPT, "--max-new-tokens", "128"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "XDG_CACHE_HOME": cache}
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    first = time.perf_counter() - begin
    rest = process.stdout.read()
    status_lines = process.stderr.read().decode().splitlines()
    if process.wait() != 0 or not rest:
        raise SystemExit("\n".join(status_lines))
    return {
        "first_text_seconds": round(first, 2),
        "end_seconds": round(time.perf_counter() - begin, 2),
        "rates": status_lines[-1],
    }


def phases(cache: str) -> dict[str, float]:
    """Returns the seconds of each step of a start with compiled programs in the cache."""
    done = subprocess.run(
        [sys.executable, "-c", PHASES, PROMPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": cache},
    )
    return json.loads(done.stdout)


def main() -> None:
    description = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=description).parse_args()
    with tempfile.TemporaryDirectory() as cache:
        runs = {"first": run(cache), "second": run(cache), "third": run(cache)}
        parts = phases(cache)
    result = {**stamp("dbrx-jax", "jax", "flax", "orbax-checkpoint"), "runs": runs, "parts_of_a_later_start": parts}
    write(result, RESULTS / "first_token.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
