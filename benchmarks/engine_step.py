"""Milliseconds of a decode step in the engine beside the same program called in a loop, and in generate.

    python -m benchmarks.engine_step [--model demo --model bench] [--dtype bfloat16]

Each round runs the three in turn with the same prompts. The best round of each counts, as other load only slows them
down. Milliseconds of all CPUs that the process takes are given too: other load changes them least. Writes
results/engine_step.json.
"""

import argparse
import json
import os
import time
from typing import NamedTuple

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
from dbrx_jax.runtime import enable_compilation_cache

MODELS = ("demo", "bench")
BATCHES = (1, 8)
PROMPT, MORE = 64, 32  # tokens; new ones of the rows that must outlast the row that is timed
CHUNK, LENGTH = 128, 512  # tokens of the prompts' chunks; positions of a row

Prompts = list[list[int]]


class Clock(NamedTuple):
    """Seconds, and seconds of CPUs that this process has taken."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.perf_counter(), time.process_time())

    def since(self, begin: "Clock", steps: int) -> "Clock":
        """Returns the milliseconds of a step."""
        return Clock(*(1e3 * (a - b) / steps for a, b in zip(self, begin, strict=True)))


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

    def step(self, prompts: Prompts, tokens: int, steps: int) -> Clock:
        """Returns the milliseconds of a decode step of all rows, `steps` of them in a call.

        A call's tokens are read while the next one runs.
        """
        programs, slots, table = self._programs, *self._start(prompts, tokens)
        calls = tokens // steps
        outputs = programs.decode(slots, table, 1)
        jax.block_until_ready(outputs)
        begin = Clock.now()
        for _ in range(calls):
            last, outputs = outputs, programs.decode(slots, table, steps)
            np.asarray(last.tokens)
        jax.block_until_ready(outputs)
        return Clock.now().since(begin, calls * steps)

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


def engine_step(engine: Engine, prompts: Prompts, tokens: int) -> tuple[Clock, int]:
    """Returns the milliseconds of a decode step while all rows run, and the number of steps of a program."""
    limits = [tokens + MORE] * (len(prompts) - 1) + [tokens + 1]
    generations = [
        engine.submit(Request(ids, GenerationConfig(max_new_tokens=limit)))
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    times, sizes = [], []
    for chunk in generations[-1]:  # it comes last, so the others run when it begins
        times.append(Clock.now())
        sizes.append(len(chunk.tokens))
    for generation in generations:
        generation.cancel()
        list(generation)
    # The first program after a prompt runs a single step.
    return times[-1].since(times[1], sum(sizes[2:])), max(sizes)


def generate_step(model: DbrxForCausalLM, prompts: Prompts, tokens: int, steps: int) -> Clock:
    """Returns the milliseconds of a decode step of generate, whose programs have no options that no row uses."""
    stream = TokenStream(model, prompts, max_new_tokens=tokens + 1, eos_token_id=None, burst=steps, cache_length=LENGTH)
    next(stream)
    begin = Clock.now()
    for _ in stream:
        pass
    return Clock.now().since(begin, tokens)


def measure(model: DbrxForCausalLM, batch: int, tokens: int, rounds: int, engine: Engine) -> dict[str, object]:
    """Returns milliseconds a step of each kind, and the engine's ratio to the others."""
    bare, steps = Bare(engine, model), 1
    times: dict[str, list[Clock]] = {"engine": [], "program": [], "generate": []}
    for number in range(rounds + 1):
        prompts = random_prompts(model.config, number, batch, PROMPT)
        found, steps = engine_step(engine, prompts, tokens)
        clocks = found, bare.step(prompts, tokens, steps), generate_step(model, prompts, tokens, steps)
        if number:  # the first compiles
            for values, clock in zip(times.values(), clocks, strict=True):
                values.append(clock)
    result: dict[str, object] = {"batch": batch, "steps_a_program": steps}
    for kind in Clock._fields:
        best = {name: min(getattr(clock, kind) for clock in clocks) for name, clocks in times.items()}
        result |= {f"{name}_{kind}_ms": round(value, 3) for name, value in best.items()}
        result |= {f"{kind}_to_{name}": round(best["engine"] / best[name], 3) for name in ("program", "generate")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_step", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", action="append", help="as in python -m benchmarks decode; demo and bench by default")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--tokens", type=int, default=32, help="timed new tokens of a row")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    run("benchmarks.engine_step", lambda: run_all(options.model or MODELS, options))


def run_all(models: tuple[str, ...], options: argparse.Namespace) -> None:
    """Measures each model, prints a line for each batch size, and writes the file."""
    enable_compilation_cache()
    load, rows = os.getloadavg()[0] / cpus(), []
    for name in models:
        model = DbrxForCausalLM.from_pretrained(checkpoint(name, cache_folder()), dtype=options.dtype)
        with Engine(model, max_rows=max(BATCHES), max_length=LENGTH, warm_up=False) as engine:
            for batch in BATCHES:
                found = measure(model, batch, options.tokens, options.rounds, engine)
                rows.append({"model": name, "dtype": options.dtype, **found})
                print_status(json.dumps(rows[-1]))
    result = stamp("dbrx-jax", "jax", "flax") | {
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0] / cpus(), 2),
    }
    result["steps"] = rows
    write(result, RESULTS / "engine_step.json")


if __name__ == "__main__":
    main()
