"""Milliseconds of prompts, from the call to the first token: by the number of rows, and by the prompt's length.

    python -m benchmarks.prompts

The demo, with positions for longer prompts than it was trained for. The best of several calls counts, with different
random prompts each time. Writes results/prompts.json.
"""

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, stamp, write
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.checkpoint.parameters import parameters_of
from dbrx_jax.demo import source_folder
from dbrx_jax.generation.stream import TokenStream

ROWS = (1, 8, 32, 128)
ROW_TOKENS = 100
LENGTHS = (8, 64, 512, 2048)
POSITIONS = 4096


def milliseconds(model: DbrxForCausalLM, rows: int, tokens: int, cache_length: int, rounds: int) -> float:
    """Returns the least time of a batch of prompts, compiled before."""
    generator, best = np.random.default_rng(0), float("inf")
    for _ in range(rounds):
        prompts = generator.integers(0, model.config.vocab_size, (rows, tokens))
        stream = TokenStream(model, prompts, max_new_tokens=2, burst=1, eos_token_id=None, cache_length=cache_length)
        stream.compile()
        next(stream)
        best = min(best, stream.timings.prefill)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompts", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="calls, of which the fastest counts (default 7)")
    rounds = parser.parse_args().rounds
    demo = DbrxForCausalLM.from_pretrained(source_folder())
    config = dataclasses.replace(demo.config, max_seq_len=POSITIONS)
    model = DbrxForCausalLM.from_parameters(config, parameters_of(demo))
    by_rows = {rows: milliseconds(model, rows, ROW_TOKENS, 1024, rounds) / rows for rows in ROWS}
    by_length = {tokens: milliseconds(model, 1, tokens, POSITIONS, rounds) for tokens in LENGTHS}
    result: dict[str, Any] = {
        **stamp("dbrx-jax", "jax", "flax"),
        "model": f"demo, {model.dtype}",
        "prompt_tokens": ROW_TOKENS,
        "milliseconds_a_row_by_rows": {rows: round(value, 2) for rows, value in by_rows.items()},
        "most_over_least": round(max(by_rows.values()) / min(by_rows.values()), 2),
        "milliseconds_by_prompt_tokens": {tokens: round(value, 2) for tokens, value in by_length.items()},
    }
    write(result, RESULTS / "prompts.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
