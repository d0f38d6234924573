"""Converts a checkpoint to Orbax: one folder per array, in parallel; a killed conversion resumes."""

from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from dbrx_convert.source import open_source
from dbrx_jax.checkpoint.companions import copy_files, write_config
from dbrx_jax.checkpoint.copy_rows import Progress
from dbrx_jax.checkpoint.manifest import FORMAT_VERSION
from dbrx_jax.checkpoint.work_folder import check_workers, fingerprint, work_folder
from dbrx_jax.checkpoint.write_orbax import finish_orbax, stored_bytes, write_arrays
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import is_remote, location, read_json
from dbrx_jax.quantization import Quantization


def to_orbax(
    source: str | Path,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    compress: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    quantization: str | Quantization | None = None,
) -> dict[str, int]:
    """Converts a Hugging Face folder to a folder that :meth:`DbrxForCausalLM.from_pretrained` loads.

    The destination appears when it is complete. To resume a killed conversion, call this again with the same
    arguments. Bytes that need no change are copied by the operating system; others go through memory in blocks of
    rows, or one expert at a time. The manifest gets a SHA-256 of each chunk of each array.

    Returns the number of infinite or NaN values of each parameter that has any; the manifest has them too.

    Args:
      source: a folder in any published layout (or an Orbax checkpoint, to change its dtype). Either
        may be the URL of a file system that fsspec knows, such as gs://bucket/folder.
      destination: a folder that does not exist yet.
      dtype: to cast the weights to, or the scales of quantised ones; unchanged by default.
      compress: with zstd; slower, and trained weights hardly get smaller.
      workers: number of threads; by default the number of CPUs, at most 4.
      progress: called with the number of source bytes converted since the last call.
      quantization: how to quantise the weights, see :meth:`Quantization.parse`.

    Raises:
      CheckpointError: the source is incomplete, not finite, quantised already, or changed since the killed run; the
        destination exists; or the disk is too small.
      QuantizationError: the quantisation is not known, or does not fit the model.
      ConfigError: the source's config.json is missing, or that or its generation_config.json cannot be used.
      TokenizerError: a file of the source's tokenizer is damaged.
    """
    check_workers(workers)
    quantization = Quantization.parse(quantization)
    source, destination = location(source), location(destination)
    checkpoint, files = open_source(source)
    if quantization and checkpoint.quantization:
        raise CheckpointError(f"{source}: its weights are {checkpoint.quantization} already; quantise what it is from")
    if compress and is_remote(destination):
        raise CheckpointError(f"{destination}: compressed checkpoints can be written to local folders only")
    dtype = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    plan = {"kind": "to-orbax", "dtype": dtype.name, "compress": compress, "format_version": FORMAT_VERSION}
    if quantization:
        plan["quantization"] = str(quantization)
    num_bytes = stored_bytes(checkpoint, dtype, quantization)
    with work_folder(destination, {**plan, "source": fingerprint(checkpoint)}, num_bytes) as folder:
        written = write_arrays(checkpoint, folder, dtype, quantization, compress, workers, progress)
        write_config(folder, read_json(source / "config.json"), dtype)
        copy_files(source, files, folder)
        source_files = {
            file.relative_to(checkpoint.path).as_posix(): {"bytes": file.stat().st_size} for file in checkpoint.files
        }
        facts = {"compressed": compress, "source_files": source_files}
        finish_orbax(checkpoint, folder, dtype, quantization, written, **facts)
    return written[1]
