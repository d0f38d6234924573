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
from dbrx_jax.engine.slots import SlotStart, empty_slots, make_row, write_slot
from dbrx_jax.generation.decode import decode, sample_first
from dbrx_jax.generation.prefill import empty_cache, prefill
from dbrx_jax.generation.state import Options
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.graph import split_model

MODELS = ("demo", "bench")
BATCHES = (1, 8)
PROMPT, MORE = 64, 32  # tokens; new ones of the rows that must outlast the row that is timed
LENGTH = 512  # positions of the engine's rows

Prompts = list[list[int]]


class Programs:
    """The engine's programs, called without an engine."""

    def __init__(self, engine: Engine, model: DbrxForCausalLM):
        self._model, self._limits, self._blocks = model, engine.limits, engine.stats().blocks + 1
        self._options = Options(top_logprobs=20)

    def step_seconds(self, prompts: Prompts, tokens: int, steps: int) -> float:
        """Returns the seconds of a decode step of all rows, `steps` of them in a call.

        Each call takes the arrays of the one before, and its tokens are read while the next one runs.
        """
        model, limits = self._model, self._limits
        model_state, config, partition = split_model(model), model.config, model.partition
        width = -(-limits.positions // limits.block)
        size = next(bucket for bucket in limits.row_buckets if bucket >= len(prompts))
        slots = np.array([*range(len(prompts)), *[limits.max_rows] * (size - len(prompts))], np.int32)
        table = np.zeros((size, width), np.int32)
        table[: len(prompts)] = 1 + np.arange(len(prompts) * width).reshape(-1, width)
        rows = [np.array(ids, np.int32) for ids in prompts] + [np.zeros(0, np.int32)] * (size - len(prompts))
        cache = empty_cache(config, partition, self._blocks, model.dtype)
        cache, x = prefill(model_state, config, partition, rows, cache, table, model.dtype)
        positions = width * limits.block
        settings, state = empty_slots(config, partition, self._options, limits.max_rows, positions)
        options, key = GenerationConfig(), np.zeros(2, np.uint32)
        for slot, ids in enumerate(rows[: len(prompts)]):
            row = make_row(options, config.vocab_size, len(ids), tokens + MORE, key, False, False, partition)
            start = np.array(SlotStart(slot, len(ids), 0, tokens + MORE), np.int32)
            padded = np.pad(ids, (0, positions - len(ids)))
            settings, state = write_slot(partition, settings, state, row.settings, padded, start)
        index = np.arange(size, dtype=np.int32)
        state, outputs = sample_first(model_state, self._options, settings, state, slots, x, index)
        jax.block_until_ready(outputs)
        many = self._options._replace(steps=STEPS)
        begin = time.perf_counter()
        for _ in range(tokens // steps):
            last = outputs
            cache, state, outputs = decode(model_state, many, settings, cache, state, slots, table, np.int32(steps))
            np.asarray(last.tokens)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - begin) / (tokens // steps * steps)


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
    programs, steps = Programs(engine, model), 1
    times: dict[str, list[float]] = {"engine": [], "program": [], "generate": []}
    for number in range(rounds + 1):
        prompts = random_prompts(model.config, number, batch, PROMPT)
        seconds, steps = engine_seconds(engine, prompts, tokens)
        kinds: dict[str, Callable[[], float]] = {
            "program": lambda p=prompts, s=steps: programs.step_seconds(p, tokens, s),
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
