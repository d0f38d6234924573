"""Milliseconds of a decode step in the engine beside the same program called in a loop, and in generate.

    python -m benchmarks.engine_step [--model demo --model bench] [--dtype bfloat16]

Each round runs the three in turn with the same prompts. Writes results/engine_step.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.checkpoints import cache_folder, checkpoint
from benchmarks.options import random_prompts
from benchmarks.record import RESULTS, cpus, stamp, write
from dbrx_jax import DbrxForCausalLM, Engine, Request
from dbrx_jax.console import print_status, run
from dbrx_jax.engine.engine import STEPS
from dbrx_jax.engine.programs import Programs
from dbrx_jax.engine.slots import SlotStart, make_row
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.generation_config import GenerationConfig

MODELS = ("demo", "bench")
BATCHES = (1, 8)
PROMPT, MORE = 64, 32  # tokens; new ones of the rows that must outlast the row that is timed
CHUNK, LENGTH = 128, 512  # tokens of the prompts' chunks; positions of a row

Prompts = list[list[int]]


class Bare:
    """The engine's programs, called without an engine."""

    def __init__(self, engine: Engine, model: DbrxForCausalLM):
        self._model, self._limits = model, engine.limits
        self._programs = Programs(
            model,
            engine.stats().blocks + 1,
            model.dtype,
            slots=engine.limits.max_rows,
            positions=LENGTH,
            steps=STEPS,
            batch_invariant=False,
            top_logprobs=20,
        )

    def step_seconds(self, prompts: Prompts, tokens: int, steps: int) -> float:
        """Returns the seconds of a decode step of all rows, `steps` of them in a call.

        A call's tokens are read while the next one runs.
        """
        programs, slots, table = self._programs, *self._start(prompts, tokens)
        calls = tokens // steps
        outputs = programs.decode(slots, table, 1)
        jax.block_until_ready(outputs)
        begin = time.perf_counter()
        for _ in range(calls):
            last, outputs = outputs, programs.decode(slots, table, steps)
            np.asarray(last.tokens)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - begin) / (calls * steps)

    def _start(self, prompts: Prompts, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Prefills prompts and samples their first tokens; returns the rows' slots and blocks, padded to a bucket."""
        programs, limits, config = self._programs, self._limits, self._model.config
        size = next(bucket for bucket in limits.row_buckets if bucket >= len(prompts))
        width = LENGTH // limits.block
        slots, table = np.full(size, limits.max_rows, np.int32), np.zeros((size, width), np.int32)
        for slot, prompt in enumerate(prompts):
            slots[slot], table[slot] = slot, 1 + slot * width + np.arange(width)
            ids = np.zeros((1, CHUNK), np.int32)
            ids[0, : len(prompt)] = prompt
            programs.prefill(table[slot : slot + 1], ids, np.array([[0, len(prompt)]], np.int32))
            limit, key = tokens + MORE, np.zeros(2, np.uint32)
            options = GenerationConfig(), config.vocab_size, len(prompt), limit, key, False, False
            start = np.array(SlotStart(slot, len(prompt), 0, limit), np.int32)
            row = make_row(*options, self._model.partition)
            programs.write_row(row, np.pad(ids[0], (0, LENGTH - CHUNK)), start)
            programs.sample_first(np.array([slot], np.int32), np.zeros(1, np.int32))
        return slots, table


def engine_seconds(engine: Engine, prompts: Prompts, tokens: int) -> tuple[float, int]:
    """Returns the seconds of a decode step while all rows run, and the number of steps of a program."""
    limits = [tokens + MORE] * (len(prompts) - 1) + [tokens + 1]
    generations = [
        engine.submit(Request(ids, GenerationConfig(max_new_tokens=limit)))
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    times, sizes = [], []
    for chunk in generations[-1]:  # it comes last, so the others run when it begins
        times.append(time.perf_counter())
        sizes.append(len(chunk.tokens))
    for generation in generations:
        generation.cancel()
        list(generation)
    # The first program after a prompt runs a single step.
    return (times[-1] - times[1]) / sum(sizes[2:]), max(sizes)


def generate_seconds(model: DbrxForCausalLM, prompts: Prompts, tokens: int, steps: int) -> float:
    """Returns the seconds of a decode step of generate, whose programs have no options that no row uses."""
    stream = TokenStream(model, prompts, max_new_tokens=tokens + 1, eos_token_id=None, burst=steps, cache_length=LENGTH)
    next(stream)
    begin = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - begin) / tokens


def measure(model: DbrxForCausalLM, batch: int, tokens: int, rounds: int, engine: Engine) -> dict[str, object]:
    """Returns milliseconds a step of each kind in each round, and their ratios to the bare program."""
    bare, steps = Bare(engine, model), 1
    times: dict[str, list[float]] = {"engine": [], "program": [], "generate": []}
    for number in range(rounds + 1):
        prompts = random_prompts(model.config, number, batch, PROMPT)
        seconds, steps = engine_seconds(engine, prompts, tokens)
        kinds: dict[str, Callable[[], float]] = {
            "program": lambda p=prompts, s=steps: bare.step_seconds(p, tokens, s),
            "generate": lambda p=prompts, s=steps: generate_seconds(model, p, tokens, s),
        }
        found = {"engine": seconds, **{name: kind() for name, kind in kinds.items()}}
        if number:  # the first compiles
            for name, value in found.items():
                times[name].append(value)
    ratios = {
        f"engine_to_{name}": [a / b for a, b in zip(times["engine"], times[name], strict=True)]
        for name in ("program", "generate")
    }
    return {
        "batch": batch,
        "steps_a_program": steps,
        **{f"{name}_ms": [round(1e3 * t, 3) for t in values] for name, values in times.items()},
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_step", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", action="append", help="as in python -m benchmarks decode; demo and bench by default")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--tokens", type=int, default=128, help="timed new tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run("benchmarks.engine_step", lambda: run_all(options.model or MODELS, options))


def run_all(models: tuple[str, ...], options: argparse.Namespace) -> None:
    """Measures each model, prints a line for each batch size, and writes the file."""
    load, rows = os.getloadavg()[0] / cpus(), []
    for name in models:
        model = DbrxForCausalLM.from_pretrained(checkpoint(name, cache_folder()), dtype=options.dtype)
        with Engine(model, max_rows=max(BATCHES), max_length=LENGTH, warm_up=False) as engine:
            for batch in BATCHES:
                found = measure(model, batch, options.tokens, options.rounds, engine)
                rows.append({"model": name, "dtype": options.dtype, **found})
                print_status(json.dumps(rows[-1]))
    result = stamp("dbrx-jax", "jax", "flax") | {"load_before": round(load, 2), "steps": rows}
    write(result, RESULTS / "engine_step.json")


if __name__ == "__main__":
    main()
