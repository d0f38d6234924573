"""Converts a checkpoint to a Hugging Face folder in the published (fused) layout, which transformers reads."""

from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from dbrx_convert.source import open_source
from dbrx_jax.checkpoint.companions import copy_files, write_config
from dbrx_jax.checkpoint.copy_rows import Progress
from dbrx_jax.checkpoint.work_folder import check_workers, fingerprint, work_folder
from dbrx_jax.checkpoint.write_huggingface import SHARD, write_shards
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import location, read_json


def to_hf(
    source: str | Path,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    max_shard_size: int = SHARD,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Converts a checkpoint of either kind to a Hugging Face folder in the published layout.

    The destination appears when it is complete. To resume a killed conversion, file by file, call this again.

    Returns the number of infinite or NaN values of each parameter that has any.

    Args:
      source: an Orbax checkpoint of dbrx-convert's, or a Hugging Face folder in any published layout.
        Either may be the URL of a file system that fsspec knows, such as gs://bucket/folder.
      destination: a folder that does not exist yet.
      dtype: to cast the weights to; unchanged by default. Quantised weights are dequantised, by default to the
        dtype of their scales.
      max_shard_size: bytes of a file, unless one tensor is larger.
      workers: number of threads; by default the number of CPUs, at most 4.
      progress: called with the number of source bytes converted since the last call.

    Raises:
      CheckpointError: the source is incomplete or changed since the killed run, the destination exists, or the
        disk is too small.
      ConfigError: the source's config.json is missing, or that or its generation_config.json cannot be used.
      TokenizerError: a file of the source's tokenizer is damaged.
    """
    check_workers(workers)
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size: expected a size above 0, got {max_shard_size}")
    source, destination = location(source), location(destination)
    checkpoint, files = open_source(source)
    target_dtype = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    plan = {"kind": "to-hf", "dtype": target_dtype.name, "max_shard_size": max_shard_size}
    num_bytes = checkpoint.config.total_parameters * target_dtype.itemsize
    with work_folder(destination, {**plan, "source": fingerprint(checkpoint)}, num_bytes) as folder:
        bad = write_shards(checkpoint, folder, target_dtype, max_shard_size, workers, progress)
        write_config(folder, {**checkpoint.config.to_dict(), **read_json(source / "config.json")}, target_dtype)
        copy_files(source, files, folder)
    return bad
