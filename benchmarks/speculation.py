"""New tokens a second of the engine with speculation by prompt lookup over those without, and what a step costs.

    python -m benchmarks.speculation

The demo continues code that it has seen once already, and samples text of its own; the engines take turns, and the
best of several rounds counts. Then steps that verify proposals are timed beside steps that decode, on the demo and on
random weights of a larger model. Writes results/speculation.json.
"""

import argparse
import fnmatch
import inspect
import json
import shlex
import statistics
import string
import textwrap
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import cache_folder, checkpoint
from benchmarks.record import RESULTS, stamp, write
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer, Engine, Request
from dbrx_jax.demo import source_folder
from dbrx_jax.generation_config import GenerationConfig

ROWS = (1, 8)
PROPOSED = (2, 4, 8)  # tokens, of the engines and of the steps
NEW_TOKENS = 160
FUNCTIONS = (
    *(textwrap.dedent, string.capwords, shlex.quote, statistics.median),
    *(textwrap.wrap, statistics.mean, fnmatch.fnmatch, shlex.split),
)
TOPICS = ("A list", "A dictionary", "The function", "In Python", "An error", "A string", "The file", "This module")


def requests(tokenizer: DbrxTokenizer, is_repetitive: bool) -> list[Request]:
    """Returns a request for each row: code and its beginning again, or a few words to sample from."""
    if is_repetitive:
        sources = [tokenizer.encode(textwrap.dedent(inspect.getsource(f)))[:300] for f in FUNCTIONS]
        greedy = GenerationConfig(max_new_tokens=NEW_TOKENS)
        return [Request([*ids, *ids[:20]], greedy) for ids in sources]
    sampled = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=True)
    return [Request(tokenizer.encode(text), sampled, seed=i) for i, text in enumerate(TOPICS)]


def tokens_a_second(engine: Engine, some: list[Request]) -> float:
    """Runs requests together."""
    begin = time.perf_counter()
    generations = [engine.submit(request) for request in some]
    count = sum(len(chunk.tokens) for generation in generations for chunk in generation)
    return count / (time.perf_counter() - begin)


def compare(engines: dict[int, Engine], some: list[Request], rounds: int) -> dict[str, Any]:
    """Returns the tokens a second of each engine, and how many of the proposed tokens were accepted."""
    best = dict.fromkeys(engines, 0.0)
    before = {number: engine.stats() for number, engine in engines.items()}
    for _ in range(rounds):
        for number, engine in engines.items():
            best[number] = max(best[number], tokens_a_second(engine, some))
    result: dict[str, Any] = {"without": round(best[0], 1)}
    for number, engine in engines.items():
        if not number:
            continue
        proposed = engine.stats().proposed_tokens - before[number].proposed_tokens
        accepted = engine.stats().accepted_tokens - before[number].accepted_tokens
        tokens = engine.stats().generation_tokens - before[number].generation_tokens
        result[f"up to {number}"] = {
            "tokens_per_second": round(best[number], 1),
            "over_without": round(best[number] / best[0], 2),
            "proposed_share": round(proposed / tokens, 2),
            "accepted_share": round(accepted / tokens, 2),
        }
    return result


def step_costs(engines: dict[int, Engine]) -> dict[str, dict[int, float]]:
    """Returns the seconds of a step that verifies over those of one that decodes, by proposals and by rows."""
    return {
        f"up to {number}": {rows: round(cost, 2) for rows, cost in engine.verify_costs.items()}
        for number, engine in engines.items()
        if number
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the fastest counts (default 5)")
    parser.add_argument("--model", default="bench", help="the larger model, as of benchmarks decode (default bench)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of its random weights")
    arguments = parser.parse_args()
    demo = DbrxForCausalLM.from_pretrained(source_folder())
    tokenizer = DbrxTokenizer.from_pretrained(source_folder())
    options: dict[str, Any] = {"max_rows": 8, "cache_gb": 0.1}
    engines = {n: Engine(demo, tokenizer, speculation=n, **options) for n in (0, *PROPOSED)}
    speeds: dict[str, Any] = {}
    for name, is_repetitive in (("code again", True), ("sampled text", False)):
        some = requests(tokenizer, is_repetitive)
        speeds[name] = {f"{rows} rows": compare(engines, some[:rows], arguments.rounds) for rows in ROWS}
    costs = {"demo": step_costs(engines)}
    for engine in engines.values():
        engine.close()
    larger = DbrxForCausalLM.from_pretrained(checkpoint(arguments.model, arguments.cache))
    options |= {"prefill_budget": 16, "max_length": 1024}
    engines = {n: Engine(larger, speculation=n, **options) for n in PROPOSED}
    costs[f"{arguments.model}, {larger.dtype}"] = step_costs(engines)
    for engine in engines.values():
        engine.close()
    result = {
        **stamp("dbrx-jax", "jax", "flax"),
        "model": f"demo, {demo.dtype}",
        "new_tokens": NEW_TOKENS,
        "tokens_per_second": speeds,
        "step_that_verifies_over_one_that_decodes": costs,
    }
    write(result, RESULTS / "speculation.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
