"""Files beside the weights: config.json, and copies of the tokenizer's files and generation_config.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_jax.checkpoint.huggingface import check_link
from dbrx_jax.errors import CheckpointError


def write_config(folder: Path, config: Mapping[str, Any], dtype: np.dtype) -> None:
    """Writes config.json for weights of a dtype, without entries about how other weights are stored."""
    entries = {
        key: value for key, value in config.items() if key not in ("dtype", "quantization", "quantization_config")
    }
    (folder / "config.json").write_text(json.dumps({**entries, "torch_dtype": dtype.name}, indent=2) + "\n")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies small files to a folder."""
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


def check_files(files: Iterable[Path]) -> None:
    """Checks that files of a checkpoint can be copied.

    Raises:
      CheckpointError: one is a link out of its folder, or not a regular file.
    """
    for file in files:
        check_link(file.parent, file)
        if not file.is_file():
            raise CheckpointError(f"{file}: not a regular file")
