"""Writes parameters as an Orbax checkpoint: one folder per array, in parallel; a killed run resumes."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dbrx_jax.checkpoint.copy_rows import Progress, append_rows, byte_progress
from dbrx_jax.checkpoint.folder import RECORDS, CheckpointFolder, shape_of
from dbrx_jax.checkpoint.manifest import FORMAT_VERSION, ArrayRecord, configuration_of, write_manifest
from dbrx_jax.checkpoint.orbax import PARAMS, STATE, stored_dtype
from dbrx_jax.checkpoint.orbax_metadata import write_orbax_metadata
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs
from dbrx_jax.checkpoint.quantized import read_quantized
from dbrx_jax.checkpoint.raw_arrays import (
    METADATA,
    chunk_rows,
    count_not_finite,
    sha256_of,
    write_all,
    write_array,
    write_compressed,
)
from dbrx_jax.checkpoint.work_folder import parallel, remove_folder
from dbrx_jax.quantization import Format, Quantization


def stored_bytes(checkpoint: CheckpointFolder, dtype: np.dtype, quantization: Quantization | None) -> int:
    """Returns the bytes of the arrays that :func:`write_arrays` writes.

    Raises:
      QuantizationError: the quantisation does not fit the model.
    """
    arrays = array_layouts(checkpoint.config, None, quantization, dtype)
    leaves = [leaf for array in arrays.values() for _, leaf, _ in array.leaves()]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def write_arrays(
    checkpoint: CheckpointFolder,
    folder: Path,
    dtype: np.dtype,
    quantization: Quantization | None = None,
    compress: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, ArrayRecord], dict[str, int]]:
    """Writes all parameters to folder/params, except arrays that a killed run has completed.

    Returns the records of the arrays, and the number of infinite or NaN values of parameters that have any.

    Args:
      dtype: of the weights, or of the scales of quantised ones.
      quantization: None dequantises; that of the checkpoint copies its values and scales; another quantises.
    """
    specs = parameter_specs(checkpoint.config)
    advance = byte_progress(checkpoint, progress)
    writer = _Writer(checkpoint, folder, dtype, quantization, compress)
    records: dict[str, ArrayRecord] = {}
    bad: dict[str, int] = {}

    def write(name: str) -> None:
        for array, (record, count) in writer.write(name).items():
            records[array] = record
            if count:
                bad[name] = count
        advance(specs[name].size)

    for path in (folder / PARAMS / STATE, folder / RECORDS):
        path.mkdir(parents=True, exist_ok=True)
    parallel(write, specs, workers)
    write_orbax_metadata(folder / PARAMS, records)
    return dict(sorted(records.items())), dict(sorted(bad.items()))


def finish_orbax(
    checkpoint: CheckpointFolder,
    folder: Path,
    dtype: np.dtype,
    quantization: Quantization | None,
    written: tuple[Mapping[str, ArrayRecord], Mapping[str, int]],
    **others: Any,
) -> None:
    """Writes the manifest of a folder whose other files are complete.

    Args:
      written: what :func:`write_arrays` returned.
      others: further entries of the manifest.
    """
    records, bad = written
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        **({"quantization": str(quantization)} if quantization else {}),
        "parameters": checkpoint.config.total_parameters,
        "source": checkpoint.description,
        **others,
        **({"not_finite": dict(bad)} if bad else {}),
        "configuration": configuration_of(checkpoint.config),
        "arrays": {name: record.to_json() for name, record in records.items()},
    }
    write_manifest(folder, manifest)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes one parameter after another; the arguments are those of :func:`write_arrays`."""

    checkpoint: CheckpointFolder
    folder: Path
    dtype: np.dtype
    quantization: Quantization | None
    compress: bool

    def write(self, name: str) -> dict[str, tuple[ArrayRecord, int]]:
        """Writes a parameter's arrays that are not there yet; returns their records and counts of not finite values."""
        format = self.quantization.format_of(name) if self.quantization else None
        names = [name] if format is None else [f"{name}.values", f"{name}.scale"]
        found = {array: result for array in names if (result := self._find(array))}
        if len(found) == len(names):
            return found
        if format is None:
            return {name: self._write_plain(name)}
        return self._write_quantized(name, format)

    def _write_plain(self, name: str) -> tuple[ArrayRecord, int]:
        shape = parameter_specs(self.checkpoint.config)[name].shape
        factor = shape_of(self.checkpoint, name)[0] // shape[0]  # published rows per row: a head is head_dim of them
        counts: list[int] = []

        def read_rows(start: int, stop: int) -> np.ndarray:
            with np.errstate(over="ignore"):  # values that overflow become infinite, and are counted
                rows = self.checkpoint.rows(name, start * factor, stop * factor).astype(self.dtype, copy=False)
            counts.append(count_not_finite(rows))
            return rows.reshape(stop - start, *shape[1:])

        def append(file: BinaryIO, start: int, stop: int) -> str:
            sha256 = hashlib.sha256()
            rows = (start * factor, stop * factor)
            counts.append(append_rows(self.checkpoint, name, *rows, self.dtype, file, sha256))
            return sha256.hexdigest()

        folder = self._state / name
        if self.compress:
            digests = write_compressed(folder, shape, self.dtype, read_rows)
        else:
            digests = write_array(folder, shape, self.dtype, append)
        return self._record(name, shape, self.dtype, digests, sum(counts))

    def _write_quantized(self, name: str, format: Format) -> dict[str, tuple[ArrayRecord, int]]:
        """Writes values and then scales: those of the checkpoint if it is quantised so, else made from its weights.

        Reads a chunk of rows at a time, or the whole of an expert's w2, whose rows are contracted.
        """
        spec = parameter_specs(self.checkpoint.config)[name]
        shapes = spec.quantized(format, self.dtype)
        scales: list[np.ndarray] = []
        rows_contracted = -len(spec.shape) in spec.contracted
        whole = None
        if self.checkpoint.quantization is None and rows_contracted:
            whole = read_quantized(self.checkpoint, name, format, self.dtype, 0, spec.shape[0])
            scales.append(whole.scale)

        def read_values(start: int, stop: int) -> np.ndarray:
            if self.checkpoint.quantization is not None:
                return self.checkpoint.stored_rows(name, "values", start, stop)
            if whole is not None:
                return whole.values[start:stop]
            block = read_quantized(self.checkpoint, name, format, self.dtype, start, stop)
            scales.append(block.scale)
            return block.values

        values = self._write(f"{name}.values", shapes.values.shape, shapes.values.dtype, read_values)
        if self.checkpoint.quantization is not None:
            scales.append(self.checkpoint.stored_rows(name, "scale", 0, shapes.scale.shape[0]).astype(self.dtype))
        scale = np.concatenate(scales)
        written = self._write(f"{name}.scale", shapes.scale.shape, self.dtype, lambda start, stop: scale[start:stop])
        return {f"{name}.values": values, f"{name}.scale": written}

    def _write(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, read_rows: Callable[[int, int], np.ndarray]
    ) -> tuple[ArrayRecord, int]:
        """Writes an array of finite values from its rows, replacing what a killed run left of it."""
        folder, dtype = self._state / name, stored_dtype(dtype)
        remove_folder(folder)

        def append(file: BinaryIO, start: int, stop: int) -> str:
            rows = read_rows(start, stop)
            write_all(file, rows)
            return sha256_of(rows)

        if self.compress:
            digests = write_compressed(folder, shape, dtype, lambda *rows: read_rows(*rows).view(dtype))
        else:
            digests = write_array(folder, shape, dtype, append)
        return self._record(name, shape, dtype, digests, 0)

    @property
    def _state(self) -> Path:
        return self.folder / PARAMS / STATE

    def _record(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, digests: list[str], bad: int
    ) -> tuple[ArrayRecord, int]:
        """Makes the record of a complete array, and notes it with the count of not finite values for a later run."""
        record = ArrayRecord(tuple(shape), dtype.name, chunk_rows(shape, dtype.itemsize), tuple(digests))
        file = self.folder / RECORDS / f"{name}.json"
        file.write_text(json.dumps({**record.to_json(), "not_finite": bad}))
        return record, bad

    def _find(self, name: str) -> tuple[ArrayRecord, int] | None:
        """Returns the record of an array that a killed run completed; None if the array must be written again."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            entry = json.loads((self.folder / RECORDS / f"{name}.json").read_text())
            if (self._state / name / METADATA).exists():
                return ArrayRecord.from_json(entry), int(entry["not_finite"])
        remove_folder(self._state / name)
        return None
