"""Converts a checkpoint to Orbax: one folder per parameter, in parallel; a killed conversion resumes."""

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jax.typing import DTypeLike

from dbrx_convert.move import Progress, append_rows, byte_progress, digest, not_finite
from dbrx_convert.work import fingerprint, parallel, work_folder
from dbrx_jax.checkpoint.folder import CheckpointFolder, shape_of
from dbrx_jax.checkpoint.huggingface import check_link
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.orbax import (
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    QUANTIZED_VERSION,
    STATE,
    digest_of,
    read_array,
    stored_dtype,
)
from dbrx_jax.checkpoint.parameters import array_layouts, nest, parameter_specs
from dbrx_jax.checkpoint.quantized import read_quantized
from dbrx_jax.checkpoint.raw_arrays import METADATA, count_not_finite, write_all, write_array, write_compressed
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import is_remote, location, read_json
from dbrx_jax.quantization import Format, Quantization
from dbrx_jax.text.tokenizer import TOKENIZER_FILES


def to_orbax(
    source: str | Path,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    compress: bool = False,
    sha256: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    quantization: str | Quantization | None = None,
) -> dict[str, int]:
    """Converts a Hugging Face folder to a folder that :meth:`DbrxForCausalLM.from_pretrained` loads.

    The destination appears when it is complete. To resume a killed conversion, call this again with the same
    arguments. Bytes that need no change are copied by the operating system; others go through memory in blocks of
    rows, or one expert at a time.

    Returns the number of infinite or NaN values of each parameter that has any; the manifest has them too.

    Args:
      source: a folder in any published layout (or an Orbax checkpoint, to change its dtype). Either
        may be the URL of a file system that fsspec knows, such as gs://bucket/folder.
      destination: a folder that does not exist yet.
      dtype: to cast the weights to, or the scales of quantised ones; unchanged by default.
      compress: with zstd; slower, and trained weights hardly get smaller.
      sha256: writes digests of the source's files and of every parameter to the manifest.
      workers: number of threads; by default the number of CPUs, at most 4.
      progress: called with the number of source bytes converted since the last call.
      quantization: how to quantise the weights, see :meth:`Quantization.parse`.

    Raises:
      CheckpointError: the source is incomplete, not finite, quantised already, or changed since the killed run; the
        destination exists; or the disk is too small.
      QuantizationError: the quantisation is not known, or does not fit the model.
      ConfigError: the source's config.json is missing or cannot be used.
    """
    quantization = Quantization.parse(quantization)
    source, destination = location(source), location(destination)
    checkpoint = open_folder(source)
    if quantization and checkpoint.quantization:
        raise CheckpointError(f"{source}: its weights are {checkpoint.quantization} already; quantise what it is from")
    if compress and is_remote(destination):
        raise CheckpointError(f"{destination}: compressed checkpoints can be written to local folders only")
    dtype = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    version = QUANTIZED_VERSION if quantization else FORMAT_VERSION
    options = {"kind": "to-orbax", "dtype": dtype.name, "compress": compress, "format_version": version}
    if quantization:
        options["quantization"] = str(quantization)
    layouts = array_layouts(checkpoint.config, None, quantization, dtype)
    leaves = {f"{name}.{part}".rstrip("."): leaf for name, a in layouts.items() for part, leaf, _ in a.leaves()}
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    with work_folder(destination, {**options, "source": fingerprint(checkpoint)}, num_bytes) as folder:
        state = folder / PARAMS / STATE
        digests, bad = _write_parameters(checkpoint, state, dtype, quantization, compress, sha256, workers, progress)
        _write_orbax_metadata(folder / PARAMS, leaves)
        write_companions(source, folder, dtype)
        manifest = _manifest(checkpoint, options, digests, bad)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return bad


def write_companions(source: Path, folder: Path, dtype: np.dtype, config: dict[str, Any] | None = None) -> None:
    """Writes config.json, and copies the tokenizer's files and generation_config.json if the source has them.

    Args:
      dtype: of the weights.
      config: entries of config.json that the source's may lack.

    Raises:
      CheckpointError: a file to copy is a link out of the source's folder, or not a regular file.
    """
    config = {**(config or {}), **read_json(source / "config.json"), "torch_dtype": dtype.name}
    for key in ("dtype", "quantization", "quantization_config"):  # they describe the source's weights
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in sorted(source.iterdir()):
        if file.name in (*TOKENIZER_FILES, "generation_config.json") or file.suffix == ".tiktoken":
            check_link(source, file)
            if not file.is_file():
                raise CheckpointError(f"{file}: not a regular file")
            (folder / file.name).write_bytes(file.read_bytes())


def _write_parameters(
    checkpoint: CheckpointFolder,
    state: Path,
    dtype: np.dtype,
    quantization: Quantization | None,
    compress: bool,
    sha256: bool,
    workers: int | None,
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, int]]:
    """Writes the parameters that are not there yet; returns digests (if `sha256`) and counts of not finite values."""
    specs = parameter_specs(checkpoint.config)
    advance = byte_progress(checkpoint, progress)
    digests: dict[str, str] = {}
    bad: dict[str, int] = {}

    def write(name: str) -> None:
        format = quantization.format_of(name) if quantization else None
        if format is not None:
            _write_quantized(checkpoint, name, format, state, dtype, compress)
            if sha256:
                for leaf in (f"{name}.values", f"{name}.scale"):
                    digests[leaf] = digest_of(read_array(state / leaf))
        else:
            if count := _write_plain(checkpoint, name, state / name, dtype, compress):
                bad[name] = count
            if sha256:
                digests[name] = digest(checkpoint, name, dtype)
        advance(specs[name].size)

    state.mkdir(parents=True, exist_ok=True)
    parallel(write, specs, workers)
    return dict(sorted(digests.items())), dict(sorted(bad.items()))


def _write_plain(checkpoint: CheckpointFolder, name: str, folder: Path, dtype: np.dtype, compress: bool) -> int:
    """Writes an unquantised parameter if it is not there yet; returns the number of its infinite or NaN values."""
    if (folder / METADATA).exists():
        return not_finite(checkpoint, name, dtype)
    shape = parameter_specs(checkpoint.config)[name].shape
    factor = shape_of(checkpoint, name)[0] // shape[0]  # published rows per row: a head is head_dim of them
    counts: list[int] = []

    def read_rows(start: int, stop: int) -> np.ndarray:
        with np.errstate(over="ignore"):  # values that overflow become infinite, and are counted
            rows = checkpoint.rows(name, start * factor, stop * factor).astype(dtype, copy=False)
        counts.append(count_not_finite(rows))
        return rows.reshape(stop - start, *shape[1:])

    def append(file: BinaryIO, start: int, stop: int) -> None:
        counts.append(append_rows(checkpoint, name, start * factor, stop * factor, dtype, file))

    if compress:
        write_compressed(folder, shape, dtype, read_rows)
    else:
        write_array(folder, shape, dtype, append)
    return sum(counts)


def _write_quantized(
    checkpoint: CheckpointFolder, name: str, format: Format, state: Path, dtype: np.dtype, compress: bool
) -> None:
    """Writes a parameter's values and then its scales, unless both are there.

    Reads a chunk of rows at a time, or the whole of an expert's w2, whose rows are contracted.
    """
    spec = parameter_specs(checkpoint.config)[name]
    shapes = spec.quantized(format, dtype)
    values_folder, scale_folder = state / f"{name}.values", state / f"{name}.scale"
    if (values_folder / METADATA).exists() and (scale_folder / METADATA).exists():
        return
    rows_contracted = -len(spec.shape) in spec.contracted
    whole = read_quantized(checkpoint, name, format, dtype, 0, spec.shape[0]) if rows_contracted else None
    scales = [] if whole is None else [whole.scale]
    values_dtype = stored_dtype(shapes.values.dtype)

    def read_values(start: int, stop: int) -> np.ndarray:
        if whole is not None:
            return whole.values[start:stop].view(values_dtype)
        block = read_quantized(checkpoint, name, format, dtype, start, stop)
        scales.append(block.scale)
        return block.values.view(values_dtype)

    _write(values_folder, shapes.values.shape, values_dtype, read_values, compress)
    scale = np.concatenate(scales)
    _write(scale_folder, shapes.scale.shape, dtype, lambda start, stop: scale[start:stop], compress)


def _write(
    folder: Path, shape: tuple[int, ...], dtype: np.dtype, read_rows: Callable[[int, int], np.ndarray], compress: bool
) -> None:
    """Writes an array from its rows, replacing what a killed run left of it."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if compress:
        write_compressed(folder, shape, dtype, read_rows)
    else:
        write_array(folder, shape, dtype, lambda file, start, stop: write_all(file, read_rows(start, stop)))


def _write_orbax_metadata(path: Path, names: Collection[str]) -> None:
    """Writes Orbax's metadata for arrays of these names: Orbax saves tiny ones, whose metadata files are copied."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    logger = logging.getLogger("absl")
    level = logger.level
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary) / path.name
        logger.setLevel(logging.ERROR)  # Orbax warns that a checkpoint without OCDBT has no OCDBT
        try:
            with context:
                ocp.save(skeleton, nest({name: np.zeros(1, np.float32) for name in names}))
        finally:
            logger.setLevel(level)
        for file in sorted(skeleton.rglob("*")):
            parts = file.relative_to(skeleton).parts
            is_of_array = len(parts) > 2 and parts[1] in names
            if file.is_file() and not is_of_array:
                target = path.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


def _manifest(checkpoint: CheckpointFolder, options: dict, digests: dict[str, str], bad: dict[str, int]) -> dict:
    """Returns the manifest, with digests of the source's files if there are `digests` of parameters."""
    source_files: dict[str, dict[str, int | str]] = {}
    for file in checkpoint.files:
        entry = source_files[file.relative_to(checkpoint.path).as_posix()] = {"bytes": file.stat().st_size}
        if digests:
            with file.open("rb") as f:
                entry["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    manifest = {
        "format_version": options["format_version"],
        "dtype": options["dtype"],
        **({"quantization": options["quantization"]} if "quantization" in options else {}),
        "compressed": options["compress"],
        "parameters": checkpoint.config.total_parameters,
        "source": checkpoint.description,
        "source_files": source_files,
    }
    return manifest | ({"not_finite": bad} if bad else {}) | ({"sha256": digests} if digests else {})
