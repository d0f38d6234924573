"""Times decode steps of `bench` with `batch_invariant` and without, in turn.

    python -m benchmarks.invariance

Writes results/invariance.json: milliseconds a step at batch sizes 1, 8 and 64.
"""

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.checkpoints import cache_folder, checkpoint
from benchmarks.record import RESULTS, stamp, write
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.generation.stream import TokenStream

DTYPES = ("float32", "bfloat16", "int8")
BATCHES = (1, 8, 64)
PROMPT, TOKENS, ROUNDS = 8, 16, 3


def step(model: DbrxForCausalLM, prompts: np.ndarray, invariant: bool) -> float:
    """Returns the milliseconds of a decode step of all rows, after the first token."""
    stream = TokenStream(model, prompts, max_new_tokens=TOKENS + 1, eos_token_id=None, batch_invariant=invariant)
    next(stream)
    begin = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - begin) / TOKENS * 1e3


def main() -> None:
    description = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.invariance", description=description).parse_args()
    folder, rows = checkpoint("bench", cache_folder()), []
    for dtype in DTYPES:
        quantized = dtype == "int8"
        model = DbrxForCausalLM.from_pretrained(
            folder, dtype="bfloat16" if quantized else dtype, quantization="int8" if quantized else None
        )
        for batch in BATCHES:
            prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PROMPT))
            times: dict[bool, list[float]] = {True: [], False: []}
            for round_number in range(ROUNDS + 1):
                for invariant, kept in times.items():
                    milliseconds = step(model, prompts, invariant)
                    if round_number:  # the first compiles
                        kept.append(milliseconds)
            ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
            rows.append({"dtype": dtype, "batch": batch, "ratio": round(ratio, 3)})
            rows[-1] |= {
                f"{name}_ms": [round(t, 1) for t in times[key]] for name, key in (("with", True), ("without", False))
            }
            print(json.dumps(rows[-1]), flush=True)
    write(stamp("dbrx-jax", "jax") | {"steps": rows}, RESULTS / "invariance.json")


if __name__ == "__main__":
    main()
