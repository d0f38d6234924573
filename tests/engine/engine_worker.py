"""Program of each process in test_processes.py: an engine on a mesh over all processes.

engine_worker.py COORDINATOR PROCESSES PROCESS_ID TASK REQUESTS
"""

import json
import sys
from pathlib import Path

import jax

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.console import run
from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.request import Request
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding import distributed

FUSED = Path(__file__).parents[1] / "golden" / "fused"
MESH = "expert=2,tensor=2"


def make_engine(task):
    model = DbrxForCausalLM.from_pretrained(FUSED, MESH, dtype="float32")
    options = {"max_rows": 6, "cache_gb": 0.02, "prefill_budget": 128, "warm_up": False}
    if task == "options":
        options["top_logprobs"] = 20 - jax.process_index()
    return Engine(model, **options)


def answer(engine, task, file):
    """Prints the completions of the requests in a file, each a dictionary in a line."""
    if task == "fail":
        engine._programs.decode = lambda *_: 1 / 0
    requests = [json.loads(line) for line in Path(file).read_text().splitlines()]
    generations = []
    for given in requests:
        config = GenerationConfig.from_dict(given["config"])
        generations.append(engine.submit(Request(given["prompt"], config, seed=given["seed"], top_logprobs=0)))
    for generation in generations:
        tokens = {}
        for chunk in generation:
            tokens.setdefault(chunk.index, []).extend(chunk.tokens)
            if task == "stream":
                print(chunk.tokens, flush=True)
        print(json.dumps([tokens[i] for i in sorted(tokens)]), flush=True)


def main():
    coordinator, processes, process_id, task, file = sys.argv[1:]
    with distributed.start(coordinator, int(processes), int(process_id)) as first, make_engine(task) as engine:
        if first:
            answer(engine, task, file)
        else:
            engine.follow()


if __name__ == "__main__":
    run("worker", main)
