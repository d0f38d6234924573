"""Time from the command to the first generated text on the demo, and to its end: the first run and the second.

    python -m benchmarks.first_token

The first run converts the demo to Orbax into an empty cache folder. Writes results/first_token.json.
"""

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


def run(cache: str) -> dict[str, Any]:
    """Seconds to the first byte on stdout and to the end of the process."""
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
    notes = process.stderr.read().decode().splitlines()
    if process.wait() != 0 or not rest:
        raise SystemExit("\n".join(notes))
    return {
        "first_text_seconds": round(first, 2),
        "end_seconds": round(time.perf_counter() - begin, 2),
        "rates": notes[-1],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        runs = {"first": run(cache), "second": run(cache), "third": run(cache)}
    result = {**stamp("dbrx-jax", "jax", "flax", "orbax-checkpoint"), "runs": runs}
    write(result, RESULTS / "first_token.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
