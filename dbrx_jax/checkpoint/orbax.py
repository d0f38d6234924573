"""OrbaxFolder: reads an Orbax checkpoint that the command dbrx-convert wrote, array by array."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from dbrx_jax.checkpoint.dtypes import common_dtype
from dbrx_jax.checkpoint.folder import and_more
from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.manifest import (
    MANIFEST,
    OLDER_VERSIONS,
    ArrayRecord,
    check_configuration,
    read_manifest,
    read_records,
)
from dbrx_jax.checkpoint.parameters import ParameterSpec, parameter_specs
from dbrx_jax.checkpoint.quantized import read_dequantized
from dbrx_jax.checkpoint.raw_arrays import METADATA, chunk_name, read_bytes, sha256_of
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import CheckpointError, ConfigError, QuantizationError
from dbrx_jax.files import is_remote, location, read_json
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.quantization.array import SCALE_DTYPES, VALUE_DTYPES

PARAMS = "params"
STATE = "state"  # Orbax's name for the one tree of a checkpoint
FLOATS = {"<f4": np.dtype(np.float32), "<f2": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {**FLOATS, "|i1": np.dtype(np.int8), "|u1": np.dtype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array's folder in zarr 2 format, in chunks of whole rows.

    Args:
      plain: uncompressed; other arrays are read by tensorstore.
      sha256: digests of the chunks, with which all that is read is compared; None: it is not.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    plain: bool
    sha256: tuple[str, ...] | None = None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def pieces(self, start: int, stop: int) -> list[tuple[Path, int, int]]:
        """Returns file, offset and length of the bytes of rows of a plain array."""
        pieces = []
        while start < stop:
            chunk, first = divmod(start, self.chunk_rows)
            num_rows = min(stop - start, self.chunk_rows - first)
            pieces.append((self.chunk_file(chunk), first * self.row_bytes, num_rows * self.row_bytes))
            start += num_rows
        return pieces

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows into memory; to compare digests, the whole of their chunks.

        Raises:
          CheckpointError: a file is missing, too short or damaged.
        """
        if self.sha256 is None:
            return self._read(start, stop)
        chunks = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
        begin = chunks.start * self.chunk_rows
        rows = self._read(begin, min(chunks.stop * self.chunk_rows, self.shape[0]))
        for index in chunks:
            first = index * self.chunk_rows - begin
            if sha256_of(rows[first : first + self.chunk_rows]) != self.sha256[index]:
                raise CheckpointError(
                    f"{self.chunk_file(index)}: its bytes are not what was written; copy it or convert again "
                    "(if you changed it on purpose: dbrx-convert seal --arrays)"
                )
        return rows[start - begin : stop - begin]

    def _read(self, start: int, stop: int) -> np.ndarray:
        if not self.plain:
            return _read_with_tensorstore(self, start, stop)
        return read_bytes(self.pieces(start, stop)).view(self.dtype).reshape(stop - start, *self.shape[1:])

    def chunk_file(self, index: int) -> Path:
        return self.folder / chunk_name(index, len(self.shape))

    def chunks(self) -> Iterator[np.ndarray]:
        """Reads the array chunk by chunk, without comparing digests."""
        for start in range(0, self.shape[0], self.chunk_rows):
            yield self._read(start, min(start + self.chunk_rows, self.shape[0]))


@dataclasses.dataclass(frozen=True)
class OrbaxFolder:
    """A complete Orbax checkpoint that dbrx-convert wrote.

    Args:
      arrays: by parameter name; for a quantised parameter `NAME.values` and `NAME.scale`.
      quantized: shapes of the quantised parameters.
      records: what the manifest records of the arrays; empty in older versions of the format.
    """

    path: Path
    config: DbrxConfig
    arrays: dict[str, StoredArray]
    manifest: dict[str, Any]
    quantization: Quantization | None
    quantized: dict[str, QuantizedArray]
    records: dict[str, ArrayRecord]

    @classmethod
    def open(cls, path: str | Path, verify: bool = False, check_manifest: bool = True) -> Self:
        """Reads config.json, the manifest and every array's metadata.

        Args:
          verify: compare all that is read from the arrays later with their digests.
          check_manifest: compare the configuration and the arrays with what the manifest records of them.

        Raises:
          CheckpointError: an array is missing, left over, damaged, or not of the shape and dtype that config.json
            and the manifest ask for; or there are no digests to verify.
          ConfigError: config.json is missing or cannot be used.
        """
        folder = location(path)
        config = DbrxConfig.from_file(folder)
        manifest = read_manifest(folder)
        records = read_records(folder, manifest)
        if check_manifest:
            check_configuration(folder, manifest, config)
        if verify and not records:
            raise CheckpointError(f"{folder}: has no digests; add them with: dbrx-convert seal {folder}")
        quantization = read_quantization(folder, manifest)
        arrays, quantized = _read_arrays(folder / PARAMS / STATE, config, quantization)
        if records and check_manifest:
            _check_records(folder, records, arrays)
        if verify:
            arrays = {name: dataclasses.replace(a, sha256=records[name].sha256) for name, a in arrays.items()}
        return cls(folder, config, arrays, manifest, quantization, quantized, records)

    @property
    def description(self) -> str:
        quantization = f", {self.quantization}" if self.quantization else ""
        return f"Orbax{quantization}" + (", compressed" if self.manifest.get("compressed") else "")

    @property
    def files(self) -> list[Path]:
        return sorted(f for array in self.arrays.values() for f in array.folder.iterdir())

    @property
    def size(self) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.arrays.values())

    def dtype(self) -> np.dtype:
        return common_dtype(self.path, map(self.parameter_dtype, parameter_specs(self.config)))

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self.arrays[f"{parameter}.scale" if parameter in self.quantized else parameter].dtype

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        spec = parameter_specs(self.config)[parameter]
        shape = stored_shape(spec)
        factor = shape[0] // spec.shape[0]  # published rows per row of the array
        first, last = start // factor, -(-stop // factor)
        if parameter in self.quantized:
            rows = read_dequantized(self, parameter, self.quantized[parameter], first, last)
        else:
            rows = self.arrays[parameter].rows(first, last)
        return rows.reshape(-1, *shape[1:])[start - first * factor : stop - first * factor]

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        rows = self.arrays[f"{parameter}.{part}"].rows(start, stop)
        return rows if part == "scale" else rows.view(VALUE_DTYPES[self.quantized[parameter].kind])

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        array = self.arrays.get(parameter)
        if array is None:  # quantised
            return None
        factor = stored_shape(parameter_specs(self.config)[parameter])[0] // array.shape[0]
        if not array.plain or start % factor or stop % factor:
            return None
        return array.pieces(start // factor, stop // factor)


def is_orbax(path: Path) -> bool:
    """Returns whether the folder has the manifest or the arrays of an Orbax checkpoint, be it complete or not."""
    return (path / MANIFEST).is_file() or (path / PARAMS / STATE).is_dir()


def read_quantization(folder: Path, manifest: Mapping[str, Any]) -> Quantization | None:
    """Parses the manifest's quantisation, which folders of format version 1 lack and those of 2 have.

    Raises:
      CheckpointError: it is unknown, or does not go with the version.
    """
    text, version = manifest.get("quantization"), manifest["format_version"]
    if not isinstance(text, str | None) or (version in OLDER_VERSIONS and (version == 2) != isinstance(text, str)):
        raise CheckpointError(
            f"{folder / MANIFEST}: quantization: does not go with the format's version; convert again"
        )
    try:
        return Quantization.parse(text)
    except QuantizationError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from None


def _read_arrays(
    state: Path, config: DbrxConfig, quantization: Quantization | None
) -> tuple[dict[str, StoredArray], dict[str, QuantizedArray]]:
    """Reads the metadata of all arrays in a folder and checks them against the configuration.

    Returns the arrays by name, and the shapes of the quantised parameters.
    """
    if not state.is_dir():
        raise CheckpointError(f"{state}: the weights are missing; copy the folder again")
    arrays, quantized = {}, {}
    for name, spec in parameter_specs(config).items():
        format = quantization.format_of(name) if quantization else None
        if format is None:
            array = arrays[name] = read_array(state / name)
            if array.shape != spec.shape:
                raise CheckpointError(f"{array.folder}: config.json asks for shape {spec.shape}, got {array.shape}")
            if array.dtype not in FLOATS.values():
                raise CheckpointError(f"{array.folder}: expected floats, got {array.dtype}; convert again")
        else:
            values, scale = (read_array(state / f"{name}.{part}") for part in ("values", "scale"))
            quantized[name] = _check_quantized(spec, format, values, scale)
            arrays |= {f"{name}.values": values, f"{name}.scale": scale}
    left_over = sorted(f.name for f in state.iterdir() if f.name not in arrays and f.is_dir())
    if left_over:
        raise CheckpointError(
            f"{state / left_over[0]}: config.json asks for no such array{and_more(left_over)}; correct config.json, or "
            "remove what is left over"
        )
    return arrays, quantized


def _check_records(folder: Path, records: Mapping[str, ArrayRecord], arrays: Mapping[str, StoredArray]) -> None:
    """Checks that the arrays are those that the manifest records.

    Raises:
      CheckpointError: there is another array, or one is stored in another way.
    """
    advice = f"copy the folder again, or if you mean it run: dbrx-convert seal {folder}"
    if different := sorted(records.keys() ^ arrays.keys()):
        kind = "does not list" if different[0] in arrays else "lists, and config.json does not ask for,"
        raise CheckpointError(f"{folder / MANIFEST}: {kind} {different[0]}{and_more(different)}; {advice}")
    for name, array in arrays.items():
        if not records[name].describes(array.shape, array.dtype, array.chunk_rows):
            raise CheckpointError(f"{array.folder}: is not stored as it was written; {advice}")


def _check_quantized(spec: ParameterSpec, format: Format, values: StoredArray, scale: StoredArray) -> QuantizedArray:
    """Returns a quantised parameter's shapes, after checking its two stored arrays against them."""
    if scale.dtype.name not in SCALE_DTYPES:
        raise CheckpointError(f"{scale.folder}: expected dtype {' or '.join(SCALE_DTYPES)}, got {scale.dtype}")
    try:
        shapes = spec.quantized(format, scale.dtype)
    except QuantizationError as error:
        raise CheckpointError(f"{values.folder}: {error}") from None
    dtype = stored_dtype(shapes.values.dtype)
    for array, shape in ((values, shapes.values.shape), (scale, shapes.scale.shape)):
        if array.shape != shape:
            raise CheckpointError(f"{array.folder}: {format} asks for shape {shape}, got {array.shape}; convert again")
    if values.dtype != dtype:
        raise CheckpointError(f"{values.folder}: {format} asks for dtype {dtype}, got {values.dtype}; convert again")
    return shapes


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype that an array is stored in: zarr 2 has no 8-bit floats, so those are bytes."""
    return np.dtype(np.uint8) if dtype == VALUE_DTYPES["fp8"] else dtype


def read_array(folder: Path) -> StoredArray:
    """Reads an array's metadata and checks it against the array's files."""
    try:
        data = read_json(folder / METADATA)
        shape, chunk, dtype = tuple(data["shape"]), tuple(data["chunks"]), DTYPES[data["dtype"]]
        plain = data["compressor"] is None
        storage = tuple(data[key] for key in ("filters", "order", "dimension_separator"))
        valid = all(isinstance(n, int) and n > 0 for n in (*shape, *chunk)) and storage == (None, "C", ".")
        valid = valid and len(shape) > 0 and chunk[1:] == shape[1:]
        valid = valid and (plain or chunk[0] <= shape[0])  # tensorstore allocates whole chunks
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(f"{folder / METADATA}: not the description of an array of weights") from None
    if not valid:
        raise CheckpointError(f"{folder / METADATA}: not the description of an array of weights")
    array = StoredArray(folder, shape, dtype, chunk[0], plain)
    for index in range(-(-shape[0] // chunk[0])):
        file, size = array.chunk_file(index), chunk[0] * array.row_bytes
        if not file.is_file():  # tensorstore would read zeros
            raise CheckpointError(f"{file}: is missing; convert or copy it again")
        if plain and file.stat().st_size != size:
            raise CheckpointError(f"{file}: is not {size} bytes long; convert or copy it again")
    return array


def _read_with_tensorstore(array: StoredArray, start: int, stop: int) -> np.ndarray:
    import tensorstore

    if is_remote(array.folder):
        raise CheckpointError(f"{array.folder}: is compressed; copy the checkpoint to a local folder to read it")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array.folder}/"}}
    try:
        return np.asarray(tensorstore.open(spec, open=True).result()[start:stop].read().result())
    except ValueError as error:
        raise CheckpointError(f"{array.folder}: cannot be read ({json.dumps(str(error))[:200]})") from None
