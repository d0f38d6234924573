"""Profiles decoding on a CPU: milliseconds a step by kind of XLA operation, from a trace.

    python -m benchmarks.profile [--model bench] [--dtype bfloat16] [--batch 1]

Operations overlap, as loops contain others and threads run in parallel, so their sum exceeds a step.
"""

import argparse
import collections
import gzip
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.checkpoints import cache_folder, checkpoint
from benchmarks.options import random_prompts
from benchmarks.workers.ours import Ours
from dbrx_jax.generation.stream import BURST, TokenStream

PROMPT, TOKENS = 64, 64
SHOWN = 12  # operations


def prefilled_stream(model: Any, prompts: list[list[int]]) -> TokenStream:
    """Returns a stream after prefill, ready for decode steps."""
    stream = TokenStream(model, prompts, max_new_tokens=TOKENS + 1, eos_token_id=None, burst=BURST)
    next(stream)
    return stream


def events(folder: Path) -> list[dict[str, Any]]:
    """Returns a trace's XLA operations, without Python functions, whose names begin with $ or contain a colon."""
    (file,) = folder.glob("**/*.trace.json.gz")
    all_events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [e for e in all_events if e.get("ph") == "X" and not re.search(r"[$:(. ]", kind_of(e["name"]))]


def kind_of(name: str) -> str:
    """Returns an instruction's name without its number."""
    return re.sub(r"(\.\d+)*(\.clone)*$", "", name)


def by_kind(operations: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Returns kind, milliseconds a step and number a step of operations, the longest first."""
    microseconds: collections.Counter[str] = collections.Counter()
    number: collections.Counter[str] = collections.Counter()
    for event in operations:
        kind = kind_of(event["name"])
        microseconds[kind] += event["dur"]
        number[kind] += 1
    return [(kind, us / 1e3 / TOKENS, number[kind] / TOKENS) for kind, us in microseconds.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="bench", help="as in python -m benchmarks decode")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, likewise")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    options = parser.parse_args()
    engine = Ours()
    engine.load(str(checkpoint(options.model, cache_folder())), options.dtype)
    prompts = random_prompts(engine.model.config, 0, options.batch, PROMPT)
    list(prefilled_stream(engine.model, prompts))  # compiles
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for traced in (False, True):
            stream = prefilled_stream(engine.model, prompts)
            if traced:
                jax.profiler.start_trace(folder)
            begin = time.perf_counter()
            list(stream)
            seconds.append(time.perf_counter() - begin)
        jax.profiler.stop_trace()
        totals = by_kind(events(Path(folder)))
    print(f"{options.model}, {options.dtype}, batch {options.batch}, jax {jax.__version__}: ms a step", end=" ")
    print(f"{seconds[0] / TOKENS * 1e3:.1f}, while traced {seconds[1] / TOKENS * 1e3:.1f}")
    for kind, ms, number in totals[:SHOWN]:
        print(f"  {ms:7.2f} in {number:6.1f} {kind}")


if __name__ == "__main__":
    main()
