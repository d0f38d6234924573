"""An Orbax checkpoint as to_orbax writes it, read array by array."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from dbrx_jax.checkpoint.folder import rows_per_block
from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.parameters import ParameterSpec, parameter_specs
from dbrx_jax.checkpoint.raw_arrays import METADATA, chunk_name, read_bytes
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import CheckpointError, ConfigError, QuantizationError
from dbrx_jax.files import is_remote, location, read_json
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.quantization.array import SCALE_DTYPES, VALUE_DTYPES

FORMAT_VERSION = 1
QUANTIZED_VERSION = 2  # of a checkpoint whose weights are quantised
MANIFEST = "dbrx_jax.json"  # what marks a folder as a checkpoint of ours: written last
PARAMS = "params"
STATE = "state"  # Orbax's name for the one tree of a checkpoint
FLOATS = {"<f4": np.dtype(np.float32), "<f2": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {**FLOATS, "|i1": np.dtype(np.int8), "|u1": np.dtype(np.uint8)}


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

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows, read into memory.

        Raises:
          CheckpointError: a file is missing, too short or damaged.
        """
        if not self.plain:
            return _decoded(self, start, stop)
        return read_bytes(self.pieces(start, stop)).view(self.dtype).reshape(stop - start, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class OrbaxFolder:
    """A complete Orbax checkpoint of dbrx-convert's.

    Args:
      arrays: by the parameters' names; of a quantised one, `NAME.values` and `NAME.scale`.
      quantized: the shapes of those parameters.
    """

    path: Path
    config: DbrxConfig
    arrays: dict[str, StoredArray]
    manifest: dict[str, Any]
    quantization: Quantization | None
    quantized: dict[str, QuantizedArray]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads config.json, the manifest and every array's description.

        Raises:
          CheckpointError: an array is missing, damaged, or not of the shape and dtype that config.json and
            the manifest ask for.
          ConfigError: config.json is missing or cannot be used.
        """
        folder = location(path)
        config = DbrxConfig.from_file(folder)
        manifest = read_manifest(folder)
        quantization = _read_quantization(folder, manifest)
        arrays, quantized = {}, {}
        for name, spec in parameter_specs(config).items():
            place = folder / PARAMS / STATE / name
            form = quantization.format_of(name) if quantization else None
            if form is None:
                array = arrays[name] = read_array(place)
                if array.shape != spec.shape:
                    raise CheckpointError(f"{array.folder}: config.json asks for shape {spec.shape}, got {array.shape}")
                if array.dtype not in FLOATS.values():
                    raise CheckpointError(f"{array.folder}: expected floats, got {array.dtype}; convert again")
            else:
                values, scale = (read_array(place.with_name(f"{name}.{part}")) for part in ("values", "scale"))
                quantized[name] = _check_quantized(spec, form, values, scale)
                arrays |= {f"{name}.values": values, f"{name}.scale": scale}
        return cls(folder, config, arrays, manifest, quantization, quantized)

    @property
    def description(self) -> str:
        words = ["Orbax", *([str(self.quantization)] if self.quantization else [])]
        return ", ".join([*words, "compressed"] if self.manifest.get("compressed") else words)

    @property
    def files(self) -> list[Path]:
        """The arrays' files."""
        return sorted(f for array in self.arrays.values() for f in array.folder.iterdir())

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.arrays.values())

    def dtype(self) -> np.dtype:
        """The one dtype of all weights, of quantised ones that of their scales.

        Raises:
          CheckpointError: they have several.
        """
        dtypes = {self.parameter_dtype(name) for name in parameter_specs(self.config)}
        if len(dtypes) > 1:
            raise CheckpointError(f"{self.path}: holds arrays of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
        return next(iter(dtypes))

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self.arrays[f"{parameter}.scale" if parameter in self.quantized else parameter].dtype

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows of a parameter in its published two-dimensional shape, read into memory and dequantised.

        Raises:
          CheckpointError: a file is missing, too short or damaged.
        """
        spec = parameter_specs(self.config)[parameter]
        shape = stored_shape(spec)
        factor = shape[0] // spec.shape[0]  # published rows a row of the array
        first, last = start // factor, -(-stop // factor)
        read = self._dequantized if parameter in self.quantized else self._plain
        rows = read(parameter, first, last).reshape(-1, *shape[1:])
        return rows[start - first * factor : stop - first * factor]

    def _plain(self, parameter: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[parameter].rows(start, stop)

    def _dequantized(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows of a quantised parameter; where they are what is summed over, whole groups are read (or pairs)."""
        like = self.quantized[parameter]
        summed = like.contracted[-1] == -like.ndim
        unit = (like.group or 2) if summed else 1
        first, last = start // unit * unit, min(-(-stop // unit) * unit, like.shape[0])
        halves = 2 if summed and like.kind == "int4" else 1
        each = like.shape[0] // like.scale.shape[0]  # rows that share a scale
        array = dataclasses.replace(
            like,
            values=self.stored_rows(parameter, "values", first // halves, -(-last // halves)),
            scale=self.stored_rows(parameter, "scale", first // each, -(-last // each)),
        )
        return array.dequantize()[start - first : stop - first]

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        """Rows of the "values" or "scale" of a quantised parameter, as they are stored.

        Raises:
          CheckpointError: a file is missing, too short or damaged.
        """
        rows = self.arrays[f"{parameter}.{part}"].rows(start, stop)
        return rows if part == "scale" else rows.view(VALUE_DTYPES[self.quantized[parameter].kind])

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        """File, offset and length of the bytes of some rows, if they are stored in the needed form; else None."""
        array = self.arrays.get(parameter)
        if array is None:  # quantised
            return None
        factor = stored_shape(parameter_specs(self.config)[parameter])[0] // array.shape[0]
        if not array.plain or start % factor or stop % factor:
            return None
        return array.pieces(start // factor, stop // factor)


def is_orbax(path: Path) -> bool:
    """Returns whether the folder is a checkpoint that dbrx-convert completed."""
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
    if version not in (FORMAT_VERSION, QUANTIZED_VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{path / MANIFEST}: format_version: expected {FORMAT_VERSION} or {QUANTIZED_VERSION}, "
            f"got {version!r:.40}; convert again"
        )
    return dict(manifest)


def _read_quantization(folder: Path, manifest: Mapping[str, Any]) -> Quantization | None:
    """Reads the quantisation from the manifest, which has one from format 2 on."""
    text = manifest.get("quantization")
    if (manifest["format_version"] == QUANTIZED_VERSION) != isinstance(text, str):
        raise CheckpointError(
            f"{folder / MANIFEST}: quantization: does not go with the format's version; convert again"
        )
    try:
        return Quantization.parse(text)
    except QuantizationError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from None


def _check_quantized(spec: ParameterSpec, form: Format, values: StoredArray, scale: StoredArray) -> QuantizedArray:
    """The shapes of a quantised parameter, as which its two arrays are stored."""
    if scale.dtype.name not in SCALE_DTYPES:
        raise CheckpointError(f"{scale.folder}: expected dtype {' or '.join(SCALE_DTYPES)}, got {scale.dtype}")
    try:
        like = spec.quantized(form, scale.dtype)
    except QuantizationError as error:
        raise CheckpointError(f"{values.folder}: {error}") from None
    dtype = stored_dtype(like.values.dtype)
    for array, want in ((values, like.values), (scale, like.scale)):
        if array.shape != want.shape:
            raise CheckpointError(
                f"{array.folder}: {form} asks for shape {want.shape}, got {array.shape}; convert again"
            )
    if values.dtype != dtype:
        raise CheckpointError(f"{values.folder}: {form} asks for dtype {dtype}, got {values.dtype}; convert again")
    return like


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that an array is stored in: zarr 2 has no 8-bit floats, so those are bytes."""
    return np.dtype(np.uint8) if dtype == VALUE_DTYPES["fp8"] else dtype


def read_array(folder: Path) -> StoredArray:
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


def digest_of(array: StoredArray) -> str:
    """SHA-256 of an array's bytes."""
    result, step = hashlib.sha256(), rows_per_block(array.shape, array.dtype.itemsize)
    for start in range(0, array.shape[0], step):
        rows = array.rows(start, min(start + step, array.shape[0]))
        result.update(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data)
    return result.hexdigest()


def _decoded(array: StoredArray, start: int, stop: int) -> np.ndarray:
    import tensorstore

    if is_remote(array.folder):
        raise CheckpointError(f"{array.folder}: is compressed; copy the checkpoint to a local folder to read it")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array.folder}/"}}
    try:
        return np.asarray(tensorstore.open(spec, open=True).result()[start:stop].read().result())
    except ValueError as error:
        raise CheckpointError(f"{array.folder}: cannot be read ({json.dumps(str(error))[:200]})") from None
