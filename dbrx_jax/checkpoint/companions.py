"""Files beside the weights: config.json, and copies of the tokenizer's files and generation_config.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import check_link


def write_config(folder: Path, config: Mapping[str, Any], dtype: np.dtype) -> None:
    """Writes config.json for weights of a dtype, without entries about how other weights are stored."""
    entries = {
        key: value for key, value in config.items() if key not in ("dtype", "quantization", "quantization_config")
    }
    (folder / "config.json").write_text(json.dumps({**entries, "torch_dtype": dtype.name}, indent=2) + "\n")


def copy_files(source: Path, files: Iterable[Path], folder: Path) -> None:
    """Copies small files of the folder `source`, or of folders in it, to the same places in another."""
    for file in files:
        target = folder.joinpath(*file.relative_to(source).parts)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())


def check_files(source: Path, files: Iterable[Path]) -> None:
    """Checks that these files of the folder `source` can be copied.

    Raises:
      CheckpointError: one is a link out of the folder, or in such a link, or not a regular file.
    """
    for file in files:
        for path in (file.parent, file):
            check_link(source, path)
        if not file.is_file():
            raise CheckpointError(f"{file}: not a regular file")
