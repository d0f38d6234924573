"""An Orbax checkpoint as to_orbax writes it, read array by array."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from dbrx_jax.config import DbrxConfig
from dbrx_jax.convert.arrays import METADATA, chunk_name, read_bytes
from dbrx_jax.convert.layouts import stored_shape
from dbrx_jax.errors import CheckpointError, ConfigError
from dbrx_jax.files import is_remote, location, read_json
from dbrx_jax.parameters import parameter_specs

FORMAT_VERSION = 1
MANIFEST = "dbrx_jax.json"  # what marks a folder as a checkpoint of ours: written last
PARAMS = "params"
STATE = "state"  # Orbax's name for the one tree of a checkpoint
DTYPES = {"<f4": np.dtype(np.float32), "<f2": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array's folder: uncompressed in chunks of whole rows, or to be read by tensorstore."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    plain: bool  # a chunk's file is its elements and nothing else

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def pieces(self, start: int, stop: int) -> list[tuple[Path, int, int]]:
        """File, offset and length of the bytes of some rows."""
        result = []
        while start < stop:
            chunk, within = divmod(start, self.chunk_rows)
            rows = min(stop - start, self.chunk_rows - within)
            file = self.folder / chunk_name(chunk, len(self.shape))
            result.append((file, within * self.row_bytes, rows * self.row_bytes))
            start += rows
        return result


@dataclasses.dataclass(frozen=True)
class OrbaxFolder:
    """A complete Orbax checkpoint of dbrx-convert's."""

    path: Path
    config: DbrxConfig
    arrays: dict[str, StoredArray]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads config.json, the manifest and every array's description.

        Raises:
          CheckpointError: an array is missing, damaged, or not of the shape that config.json asks for.
          ConfigError: config.json is missing or cannot be used.
        """
        folder = location(path)
        config = DbrxConfig.from_file(folder)
        manifest = read_manifest(folder)
        arrays = {}
        for name, spec in parameter_specs(config).items():
            array = _read_array(folder / PARAMS / STATE / name)
            if array.shape != spec.shape:
                raise CheckpointError(f"{array.folder}: config.json asks for shape {spec.shape}, got {array.shape}")
            arrays[name] = array
        return cls(folder, config, arrays, manifest)

    @property
    def description(self) -> str:
        return "Orbax, compressed" if self.manifest.get("compressed") else "Orbax"

    @property
    def files(self) -> list[Path]:
        """The arrays' files."""
        return sorted(f for array in self.arrays.values() for f in array.folder.iterdir())

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.arrays.values())

    def dtype(self) -> np.dtype:
        """The one dtype of all weights.

        Raises:
          CheckpointError: they have several.
        """
        dtypes = {a.dtype for a in self.arrays.values()}
        if len(dtypes) > 1:
            raise CheckpointError(f"{self.path}: holds arrays of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
        return next(iter(dtypes))

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self.arrays[parameter].dtype

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows of a parameter in its published two-dimensional shape, read into memory.

        Raises:
          CheckpointError: a file is missing, too short or damaged.
        """
        array = self.arrays[parameter]
        shape = stored_shape(parameter_specs(self.config)[parameter])
        factor = shape[0] // array.shape[0]  # published rows a row of the array
        first, last = start // factor, -(-stop // factor)
        data = read_bytes(array.pieces(first, last)).view(array.dtype) if array.plain else _decoded(array, first, last)
        rows = data.reshape(-1, *shape[1:])
        return rows[start - first * factor : stop - first * factor]

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        """File, offset and length of the bytes of some rows, where they lie as they are needed; else None."""
        array = self.arrays[parameter]
        factor = stored_shape(parameter_specs(self.config)[parameter])[0] // array.shape[0]
        if not array.plain or start % factor or stop % factor:
            return None
        return array.pieces(start // factor, stop // factor)


def is_orbax(path: Path) -> bool:
    """Whether the folder is a checkpoint that dbrx-convert completed."""
    return (path / MANIFEST).is_file() and (path / PARAMS).is_dir()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises:
      CheckpointError: it is damaged, or of a format that this release does not read.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = manifest.get("format_version") if isinstance(manifest, Mapping) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: format_version: expected {FORMAT_VERSION}, got {version!r:.40}; convert again"
        )
    return dict(manifest)


def _read_array(folder: Path) -> StoredArray:
    """An array's description, checked against its files."""
    try:
        data = read_json(folder / METADATA)
        shape, chunk, dtype = tuple(data["shape"]), tuple(data["chunks"]), DTYPES[data["dtype"]]
        raw = (data["compressor"], data["filters"], data["order"], data["dimension_separator"]) == (
            None,
            None,
            "C",
            ".",
        )
        plain = raw and chunk[1:] == shape[1:]
        whole = all(isinstance(n, int) and n > 0 for n in (*shape, *chunk)) and len(chunk) == len(shape) > 0
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(f"{folder / METADATA}: not the description of an array of weights") from None
    if not whole:
        raise CheckpointError(f"{folder / METADATA}: not the description of an array of weights")
    array = StoredArray(folder, shape, dtype, chunk[0], plain)
    for index in range(-(-shape[0] // chunk[0])) if plain else ():
        file, size = folder / chunk_name(index, len(shape)), chunk[0] * array.row_bytes
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file}: is missing or not {size} bytes long; convert or copy it again")
    return array


def _decoded(array: StoredArray, start: int, stop: int) -> np.ndarray:
    import tensorstore

    if is_remote(array.folder):
        raise CheckpointError(f"{array.folder}: is compressed; copy the checkpoint to a local folder to read it")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array.folder}/"}}
    try:
        return np.asarray(tensorstore.open(spec, open=True).result()[start:stop].read().result())
    except ValueError as error:
        raise CheckpointError(f"{array.folder}: cannot be read ({json.dumps(str(error))[:200]})") from None
