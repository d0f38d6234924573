"""Continues prompts with a model that is laid over a mesh of devices, of one process or of many hosts.

    python examples/sharded_generate.py CHECKPOINT --mesh v5e-64 --prompt 'What is a word?' --distributed

On one process, leave --distributed out. On several, start the same command on each: Cloud TPU VMs,
GKE and SLURM need no more (docs/multihost.md has the recipes); elsewhere give each process
--coordinator HOST:PORT, --processes N and --process-id I too. To try it on a CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8 for eight devices a process.
"""

import argparse
import contextlib
import json

from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.console import run
from dbrx_jax.runtime import set_process_defaults
from dbrx_jax.sharding import distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Orbax folder made by dbrx-convert, or Hugging Face folder")
    parser.add_argument("--mesh", required=True, help="a recipe's name, or axes such as expert=16,tensor=4")
    parser.add_argument("--prompt", nargs="+", required=True, help="texts to continue, together")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, help="of the draws, with a temperature above 0")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    set_process_defaults()
    with (
        distributed.start(args.coordinator, args.processes, args.process_id)
        if args.distributed
        else contextlib.nullcontext()
    ):
        generate(args)


def generate(args: argparse.Namespace) -> None:
    """Every process does all of this, on the same prompts; what it prints is seen from the first alone."""
    tokenizer = DbrxTokenizer.from_pretrained(args.checkpoint)
    model = DbrxForCausalLM.from_pretrained(args.checkpoint, args.mesh)  # reads the shards of its own devices
    batch = tokenizer.pad([tokenizer.encode(prompt) for prompt in args.prompt])
    options = {"max_new_tokens": args.max_new_tokens}
    if args.temperature:
        options |= {"do_sample": True, "temperature": args.temperature, "seed": args.seed}
    rows = model.generate(**batch, **options)
    for prompt, row in zip(args.prompt, rows, strict=True):
        new = row[batch["input_ids"].shape[1] :]
        print(json.dumps({"prompt": prompt, "completion": tokenizer.decode(new, skip_special_tokens=True)}))


if __name__ == "__main__":
    run("sharded_generate", main)
