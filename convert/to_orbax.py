"""Converts a checkpoint to Orbax: a folder for each parameter, in parallel, continuing a killed run."""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jax.typing import DTypeLike

from dbrx_convert.move import append_rows, digest, not_finite
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
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.text.tokenizer import TOKENIZER_FILES


def to_orbax(
    source: str | Path,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    compress: bool = False,
    sha256: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    quantization: str | Quantization | None = None,
) -> dict[str, int]:
    """Converts a Hugging Face folder to a folder that :meth:`DbrxForCausalLM.from_pretrained` loads.

    The destination appears when it is complete, and not before. A conversion that was killed is
    continued by calling this again with the same arguments. Bytes that need no change are copied
    by the operating system; others go through memory a few rows, or one expert, at a time.

    Returns how many values of each parameter are infinite or NaN, where any are; the manifest says so too.

    Args:
      source: a folder in any published layout (or an Orbax checkpoint, to change its dtype). Either
        may be the URL of a file system that fsspec knows, such as gs://bucket/folder.
      destination: a folder that does not exist yet.
      dtype: to cast the weights to, and of quantised ones the scales; by default they stay as they are.
      compress: with zstd; slower, and trained weights hardly get smaller.
      sha256: put digests of the source's files and of every parameter into the manifest.
      workers: threads; as many as there are CPUs, at most 4, by default.
      progress: called with numbers of source bytes as they are done.
      quantization: how to quantise the weights, see :meth:`Quantization.parse`.

    Raises:
      CheckpointError: the source is not a whole checkpoint or changed since a run that was killed,
        the destination exists, or the disk is too small; or the weights are quantised already or not finite.
      QuantizationError: the quantisation is not known, or does not fit the model.
      ConfigError: the source's config.json is missing or cannot be used.
    """
    asked = Quantization.parse(quantization)
    source, destination = location(source), location(destination)
    checkpoint = open_folder(source)
    if asked and checkpoint.quantization:
        raise CheckpointError(f"{source}: its weights are {checkpoint.quantization} already; quantise what it is from")
    target = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    version = QUANTIZED_VERSION if asked else FORMAT_VERSION
    options = {"kind": "to-orbax", "dtype": target.name, "compress": compress, "format_version": version}
    options |= {"quantization": str(asked)} if asked else {}
    arrays = array_layouts(checkpoint.config, None, asked, target)
    leaves = {f"{name}.{part}".rstrip("."): leaf for name, a in arrays.items() for part, leaf, _ in a.leaves()}
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    if compress and is_remote(destination):
        raise CheckpointError(f"{destination}: compressed checkpoints can be written to local folders only")
    with work_folder(destination, {**options, "source": fingerprint(checkpoint)}, size) as folder:
        state = folder / PARAMS / STATE
        digests, bad = _write_parameters(checkpoint, state, target, asked, compress, sha256, workers, progress)
        _write_orbax_metadata(folder / PARAMS, leaves)
        config = {**read_json(source / "config.json"), "torch_dtype": target.name}
        for key in ("dtype", "quantization", "quantization_config"):  # of the source's weights
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(source, folder)
        manifest = _manifest(checkpoint, options, digests, bad)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return bad


def copy_companions(source: Path, folder: Path) -> None:
    """The tokenizer's files and generation_config.json, where the source has them.

    Raises:
      CheckpointError: one is a link out of the source's folder, or no file.
    """
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
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, str], dict[str, int]]:
    """All parameters that are not there yet; returns digests where asked for, and counts of what is not finite."""
    specs = parameter_specs(checkpoint.config)
    share = checkpoint.size / checkpoint.config.total_parameters  # source bytes a weight, on average
    digests: dict[str, str] = {}
    bad: dict[str, int] = {}

    def write(name: str) -> None:
        form = quantization.format_of(name) if quantization else None
        if form is None:
            plain(name)
        else:
            _write_quantized(checkpoint, name, form, state, dtype, compress)
            if sha256:
                for leaf in (f"{name}.values", f"{name}.scale"):
                    digests[leaf] = digest_of(read_array(state / leaf))
        if progress is not None:
            progress(round(specs[name].size * share))

    def plain(name: str) -> None:
        spec, folder, count = specs[name], state / name, 0
        factor = shape_of(checkpoint, name)[0] // spec.shape[0]  # a row of heads is several published rows

        def append(file: BinaryIO, start: int, stop: int) -> None:
            nonlocal count
            count += append_rows(checkpoint, name, start * factor, stop * factor, dtype, file)

        def read(start: int, stop: int) -> np.ndarray:
            nonlocal count
            with np.errstate(over="ignore"):
                rows = checkpoint.rows(name, start * factor, stop * factor).astype(dtype, copy=False)
            count += count_not_finite(rows)
            return rows.reshape(stop - start, *spec.shape[1:])

        if (folder / METADATA).exists():
            count = not_finite(checkpoint, name, dtype)
        elif compress:
            write_compressed(folder, spec.shape, dtype, read)
        else:
            write_array(folder, spec.shape, dtype, append)
        if count:
            bad[name] = count
        if sha256:
            digests[name] = digest(checkpoint, name, dtype)

    state.mkdir(parents=True, exist_ok=True)
    parallel(write, specs, workers)
    return dict(sorted(digests.items())), dict(sorted(bad.items()))


def _write_quantized(
    checkpoint: CheckpointFolder, name: str, form: Format, state: Path, dtype: np.dtype, compress: bool
) -> None:
    """A parameter's values and then its scales, unless both are there: a chunk's rows at a time, or the whole of an
    expert's w2, whose rows are what is summed over.
    """
    spec = parameter_specs(checkpoint.config)[name]
    like, folders = spec.quantized(form, dtype), [state / f"{name}.{part}" for part in ("values", "scale")]
    if all((folder / METADATA).exists() for folder in folders):
        return
    scales: list[np.ndarray] = []
    whole: QuantizedArray | None = None
    if -len(spec.shape) in spec.contracted:
        whole = read_quantized(checkpoint, name, form, dtype, 0, spec.shape[0])
        scales.append(whole.scale)

    def values(start: int, stop: int) -> np.ndarray:
        if whole is not None:
            return whole.values[start:stop].view(stored)
        block = read_quantized(checkpoint, name, form, dtype, start, stop)
        scales.append(block.scale)
        return block.values.view(stored)

    stored = stored_dtype(like.values.dtype)
    _write(folders[0], like.values.shape, stored, values, compress)
    scale = np.concatenate(scales)
    _write(folders[1], like.scale.shape, dtype, lambda start, stop: scale[start:stop], compress)


def _write(
    folder: Path, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[int, int], np.ndarray], compress: bool
) -> None:
    """An array from its rows, over what a killed run may have left of it."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if compress:
        write_compressed(folder, shape, dtype, read)
    else:
        write_array(folder, shape, dtype, lambda file, start, stop: write_all(file, read(start, stop)))


def _write_orbax_metadata(path: Path, names: Collection[str]) -> None:
    """Lets Orbax write its own metadata, from a tree with the same names and tiny arrays."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary) / path.name
        with context, _quiet_orbax():
            ocp.save(skeleton, nest({name: np.zeros(1, np.float32) for name in names}))
        for file in sorted(skeleton.rglob("*")):
            parts = file.relative_to(skeleton).parts
            if file.is_file() and not (len(parts) > 2 and parts[1] in names):
                target = path.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Without Orbax's warning that a checkpoint without OCDBT has no OCDBT."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _manifest(checkpoint: CheckpointFolder, options: dict, digests: dict[str, str], bad: dict[str, int]) -> dict:
    sources: dict[str, dict[str, int | str]] = {}
    for file in checkpoint.files:
        name = file.relative_to(checkpoint.path).as_posix()
        sources[name] = {"bytes": file.stat().st_size}
        if digests:
            with file.open("rb") as f:
                sources[name]["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    manifest = {
        "format_version": options["format_version"],
        "dtype": options["dtype"],
        **({"quantization": options["quantization"]} if "quantization" in options else {}),
        "compressed": options["compress"],
        "parameters": checkpoint.config.total_parameters,
        "source": checkpoint.description,
        "source_files": sources,
    }
    return manifest | ({"not_finite": bad} if bad else {}) | ({"sha256": digests} if digests else {})
