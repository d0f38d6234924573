"""Saves a model as an Orbax or Hugging Face folder, array by array."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dbrx_jax.checkpoint.companions import check_files, copy_files, write_config
from dbrx_jax.checkpoint.copy_rows import Progress
from dbrx_jax.checkpoint.model_folder import ModelFolder
from dbrx_jax.checkpoint.work_folder import work_folder
from dbrx_jax.checkpoint.write_huggingface import write_shards
from dbrx_jax.checkpoint.write_orbax import finish_orbax, stored_bytes, write_arrays
from dbrx_jax.console import progress
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import location
from dbrx_jax.generation_config import FILE as GENERATION_CONFIG
from dbrx_jax.model.causal_lm import CausalLM

FORMATS = ("orbax", "hf")


def save_model(
    model: CausalLM,
    destination: str | Path,
    format: str,
    source: Path | None,
    files: Sequence[Path],
    generation_config: Mapping[str, Any],
    show_progress: bool | None = None,
) -> None:
    """Saves a model; see :meth:`dbrx_jax.DbrxForCausalLM.save_pretrained`.

    Args:
      source: the checkpoint that the model was loaded from; None if it is not there.
      files: of the source, to copy, such as the tokenizer's.
      generation_config: the contents of generation_config.json.
      show_progress: see :func:`dbrx_jax.console.is_shown`.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format: expected {' or '.join(FORMATS)}, got {format!r:.40}")
    folder = ModelFolder(model)
    if folder.is_shared and jax.process_index() != 0:
        folder.follow()
        return
    with folder.leading(), progress("Saving", folder.size, show_progress) as advance:
        _save(folder, location(destination), format, source, files, generation_config, advance)


def _save(
    model: ModelFolder,
    destination: Path,
    format: str,
    source: Path | None,
    files: Sequence[Path],
    generation_config: Mapping[str, Any],
    advance: Progress,
) -> None:
    dtype, quantization = model.dtype(), model.quantization if format == "orbax" else None
    plan, num_bytes = {"kind": "save_pretrained"}, stored_bytes(model, dtype, quantization)
    if source is not None:
        check_files(source, files)
    with work_folder(destination, plan, num_bytes, resume=False) as folder:
        write_config(folder, model.config.to_dict(), dtype)
        if source is not None:
            copy_files(source, files, folder)
        if generation_config:
            (folder / GENERATION_CONFIG).write_text(json.dumps(generation_config, indent=2) + "\n")
        if format == "hf":
            write_shards(model, folder, dtype, progress=advance)
            return
        written = write_arrays(model, folder, dtype, quantization, progress=advance)
        finish_orbax(model, folder, dtype, quantization, written, compressed=False)
