"""The converter at DBRX's true widths beside `cp` of the same files, each ending in sync.

    python benchmarks/convert.py --folder SCRATCH [--layers 1] [--experts 16]

Makes a random checkpoint (one layer is 6.5 GB, embedding and head 2.5 GB more) in SCRATCH, then in
turns: cp, to-orbax, to-hf, loading into memory. Writes results/convert.json: GB/s, the ratio to cp,
and how much anonymous memory (RssAnon) each took. Needs up to four times the checkpoint's size on disk.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from dbrx_jax.config import DbrxConfig
from dbrx_jax.convert.layouts import FUSED, expand
from dbrx_jax.convert.to_hf import SHARD, _write_index, plan_shards

MEASURE = """
import sys, threading, time, os, json
name, source, destination = sys.argv[1:]
import numpy as np
from dbrx_jax.convert.to_orbax import to_orbax
from dbrx_jax.convert.to_hf import to_hf
from dbrx_jax.convert.folder import open_folder, rows_per_block, shape_of
from dbrx_jax.parameters import parameter_specs
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous()); time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
begin = time.perf_counter()
if name == "load":
    from dbrx_jax import DbrxForCausalLM
    model = DbrxForCausalLM.from_pretrained(source)
else:
    {"to-orbax": to_orbax, "to-hf": to_hf}[name](source, destination)
    os.sync()
print(json.dumps({"seconds": time.perf_counter() - begin, "rss_anon_bytes": peak}))
"""


def make(folder: Path, layers: int, experts: int) -> DbrxConfig:
    """A checkpoint of random bfloat16 bits below 2, in the published layout and file size."""
    base = DbrxConfig.from_name("132b-base").to_dict()
    base["n_layers"] = layers
    base["ffn_config"] |= {"moe_num_experts": experts, "moe_top_k": min(4, experts)}
    config = DbrxConfig.from_dict(base)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(base))
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    shards = plan_shards(expand(FUSED, config), dtype, SHARD)
    for shard in shards:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in shard.tensors.items():
            end = offset + math.prod(tensor.shape) * 2
            header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        with (folder / shard.file).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, 64 << 20):
                f.write((rng.integers(0, 1 << 16, min(64 << 20, offset - start) // 2, np.uint16) & 0xBFFF).tobytes())
    if len(shards) > 1:
        _write_index(folder / "model.safetensors.index.json", shards, config.total_parameters, dtype)
    return config


def copy(source: Path, destination: Path) -> float:
    os.sync()
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    os.sync()
    return time.perf_counter() - begin


def measure(name: str, source: Path, destination: Path) -> dict[str, float]:
    os.sync()
    done = subprocess.run([sys.executable, "-c", MEASURE, name, source, destination], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    work = args.folder / "dbrx-convert-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    config = make(work / "source", args.layers, args.experts)
    gigabytes = config.total_parameters * 2 / 1e9
    rounds = []
    for _ in range(args.rounds):
        row = {"cp": {"seconds": copy(work / "source", work / "cp")}}
        shutil.rmtree(work / "cp")
        row["to-orbax"] = measure("to-orbax", work / "source", work / "orbax")
        row["load"] = measure("load", work / "orbax", work / "none")
        row["to-hf"] = measure("to-hf", work / "orbax", work / "hf")
        shutil.rmtree(work / "hf")
        shutil.rmtree(work / "orbax")
        for entry in row.values():
            entry["gb_per_second"] = round(gigabytes / entry["seconds"], 3)
            entry["ratio_to_cp"] = round(row["cp"]["seconds"] / entry["seconds"], 3)
            entry["seconds"] = round(entry["seconds"], 2)
        rounds.append(row)
        print(json.dumps(row, indent=2))
    shutil.rmtree(work)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no accelerator",
        "python": platform.python_version(),
        "versions": {n: importlib.metadata.version(n) for n in ("dbrx-jax", "jax", "orbax-checkpoint")},
        "checkpoint": {"layers": args.layers, "experts": args.experts, "gigabytes": round(gigabytes, 2)},
        "rounds": rounds,
    }
    path = Path(__file__).parent / "results" / "convert.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
