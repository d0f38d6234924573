"""Checkpoints for the benchmarks: the demo, and random weights in a configuration's sizes, written once and cached."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from dbrx_jax.checkpoint.layouts import FUSED, expand
from dbrx_jax.checkpoint.write_huggingface import SHARD, plan_shards, write_index
from dbrx_jax.config import DbrxConfig, config_names
from dbrx_jax.demo import source_folder
from dbrx_jax.runtime import user_cache_folder

BLOCK = 16 << 20  # values generated at a time

Values = Callable[[str, int], Iterator[np.ndarray]]  # from a tensor's name and size to its bytes in blocks


def cache_folder() -> Path:
    """Returns the default folder of checkpoints that are kept from run to run."""
    return user_cache_folder() / "benchmarks"


def checkpoint(model: str, cache: Path) -> Path:
    """Returns the Hugging Face folder of a model.

    Args:
      model: "demo", another configuration's name, whose weights are then random, or a folder.
      cache: folder of random checkpoints; a missing one is written.

    Raises:
      ConfigError: there is neither such a configuration nor such a folder.
    """
    if model == "demo":
        return source_folder()
    if model in config_names():
        folder = cache / model
        if not (folder / "config.json").exists():
            write_random(DbrxConfig.from_name(model), folder)
        return folder
    folder = Path(model)
    return folder if folder.is_dir() else (DbrxConfig.from_name(model), folder)[1]


def write_random(config: DbrxConfig, folder: Path) -> None:
    """Writes normal weights at initializer_range and norms of one, the same each time, in bfloat16."""
    rng = np.random.default_rng(0)

    def values(name: str, size: int) -> Iterator[np.ndarray]:
        for start in range(0, size, BLOCK):
            count = min(BLOCK, size - start)
            block = np.ones(count, np.float32)
            if not name.split(".")[-2].startswith("norm_"):
                block = rng.standard_normal(count, np.float32) * np.float32(config.initializer_range)
            yield block.astype(ml_dtypes.bfloat16).view(np.uint8)

    write_folder(config, folder, values)


def write_folder(config: DbrxConfig, folder: Path, values: Values) -> None:
    """Writes a checkpoint in the published layout and file size, in bfloat16; config.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(ml_dtypes.bfloat16)
    shards = plan_shards(expand(FUSED, config), dtype, SHARD)
    for shard in shards:
        with (folder / shard.file).open("wb") as f:
            f.write(shard.header(dtype))
            for name, tensor in shard.tensors.items():
                for block in values(name, math.prod(tensor.shape)):
                    f.write(block.data)
    if len(shards) > 1:
        write_index(folder / "model.safetensors.index.json", shards, config.total_parameters, dtype)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "torch_dtype": dtype.name}, indent=2) + "\n")
