"""HuggingFaceFolder: reads a folder of safetensors files, after checking it as a whole."""

import dataclasses
import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dbrx_jax.checkpoint.dtypes import common_dtype
from dbrx_jax.checkpoint.folder import and_more
from dbrx_jax.checkpoint.layouts import Layout, SourceTensor, TensorRows, expand, recognise
from dbrx_jax.checkpoint.quantization_entries import check_entries, read_entries
from dbrx_jax.checkpoint.stored_tensors import FLOATS, Fp8Tensor, MlxTensor, PlainTensor, StoredTensor
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import CheckpointError, ConfigError
from dbrx_jax.files import check_link, is_remote, location, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U32": np.dtype(np.uint32),  # MLX's packed weights
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
MAX_HEADER = 100_000_000  # bytes; the safetensors library's limit


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """A complete checkpoint in a published layout, whose tensors match its config.json.

    Args:
      tensors, stored: by tensor name, the layout's description and the tensor in its files.
      tensor_quantization: how tensors are quantised, for people.
      locations: by parameter name, its tensor's name and its rows in it.
    """

    path: Path
    config: DbrxConfig
    layout: Layout
    tensors: dict[str, SourceTensor]
    stored: dict[str, StoredTensor]
    tensor_quantization: str
    locations: dict[str, tuple[str, TensorRows]]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads config.json, the index and every file's header.

        Raises:
          CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of the wrong shape
            or dtype; the message names the first one.
          ConfigError: config.json is missing or cannot be used.
        """
        folder = location(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        config_file = folder / "config.json"
        config = DbrxConfig.from_file(config_file)
        try:
            entries = read_entries(config_file, read_json(config_file))
            plain, total_size = _read_folder(folder)
        except ConfigError as error:  # an unreadable index or config is an error of the checkpoint
            raise CheckpointError(str(error)) from None
        layout = recognise(plain)
        tensors = expand(layout, config)
        stored = _pair_with_scales(plain, tensors, next((e.mlx for e in entries if e.mlx), None))
        _check_tensors(folder, tensors, stored)
        check_entries(config_file, entries, stored)
        size = sum(t.nbytes for t in plain.values())
        if total_size is not None and total_size != size:
            raise CheckpointError(
                f"{folder / INDEX}: total_size is {total_size!r:.40} and the tensors have {size} bytes; "
                "find the right files, or mend that number"
            )
        kinds = sorted({t.quantization for t in stored.values() if t.quantization})
        locations = {rows.parameter: (name, rows) for name, tensor in tensors.items() for rows in tensor.parts}
        return cls(folder, config, layout, tensors, stored, ", ".join(kinds), locations)

    @property
    def description(self) -> str:
        """The layout, and how weights are quantised."""
        return f"{self.layout.name} layout" + (f", {self.tensor_quantization}" if self.tensor_quantization else "")

    @property
    def quantization(self) -> None:
        """None: quantised tensors are dequantised when they are read."""
        return None

    @property
    def files(self) -> list[Path]:
        return sorted({file for tensor in self.stored.values() for file in tensor.files})

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    def dtype(self) -> np.dtype:
        return common_dtype(self.path, (tensor.dtype for tensor in self.stored.values()))

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self.stored[self.locations[parameter][0]].dtype

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        name, rows = self.locations[parameter]
        if self.tensors[name].transposed:
            return self.stored[name].rows(0, self.tensors[name].shape[0]).T[start:stop]
        return self.stored[name].rows(rows.start + start, min(rows.start + stop, rows.stop))

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError("a Hugging Face folder has no weights in the project's own formats")

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        name, rows = self.locations[parameter]
        stored = self.stored[name]
        if not isinstance(stored, PlainTensor) or self.tensors[name].transposed:
            return None
        offset = stored.offset + (rows.start + start) * stored.row_bytes
        return [(stored.file, offset, (stop - start) * stored.row_bytes)]


def _read_folder(folder: Path) -> tuple[dict[str, PlainTensor], Any]:
    """Returns every tensor of the folder by name, and the index's total_size if it has one."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no *.safetensors files")
        tensors: dict[str, PlainTensor] = {}
        for file in files:
            for name, tensor in _read_header(folder, file.name).items():
                if name in tensors:
                    raise CheckpointError(f"{name}: is in both {tensors[name].file.name} and {file.name} in {folder}")
                tensors[name] = tensor
        return tensors, None
    weight_map, total_size = _read_index(folder / INDEX)
    headers = {name: _read_header(folder, name) for name in sorted(set(weight_map.values()))}
    for file_name, header in headers.items():
        for name in header:
            if weight_map.get(name) != file_name:
                raise CheckpointError(f"{folder / file_name}: holds {name}, which {INDEX} does not place there")
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(f"{folder / file_name}: does not hold {name}, which {INDEX} places there")
    return {name: headers[file_name][name] for name, file_name in weight_map.items()}, total_size


def _read_index(path: Path) -> tuple[dict[str, str], Any]:
    """Returns the index's weight_map and its metadata.total_size."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object weight_map from tensors to files")
    for name, file in weight_map.items():
        # Only a file directly in this folder: a path could lead out of it.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or "\0" in file
            or not file.endswith(".safetensors")
            or not file.isascii()
        ):
            raise CheckpointError(
                f"{path}: {name}: expected the name of a .safetensors file in this folder, got {file!r}"
            )
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _read_header(folder: Path, name: str) -> dict[str, PlainTensor]:
    """Returns the tensors of one file by name."""
    file = folder / name
    try:
        check_link(folder, file)
        if not file.is_file():
            raise CheckpointError(f"{file}: there is no such file")
        header, length = _checked_header(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); download or copy it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for tensor, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {tensor}: expected dtype F32, BF16 or F16, got {entry['dtype']}")
        offset = 8 + length + entry["data_offsets"][0]
        tensors[tensor] = PlainTensor(file, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def _checked_header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the header and its length in bytes, after the safetensors library has checked it against the file."""
    with file.open("rb") as f:
        length_bytes = f.read(8)
        (length,) = struct.unpack("<Q", length_bytes.ljust(8, b"\0"))
        if not is_remote(file):
            with safe_open(file, "numpy"):
                pass
            return json.loads(f.read(length)), length
        text = f.read(min(length, MAX_HEADER))
    # The library reads only local files: give it a sparse file with the same header and size.
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as local:
        local.write(length_bytes + text)
        local.truncate(file.stat().st_size)
        local.flush()
        with safe_open(local.name, "numpy"):
            pass
    return json.loads(text), length


def _pair_with_scales(
    plain: dict[str, PlainTensor], tensors: dict[str, SourceTensor], mlx: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    """Replaces quantised weights, their scales and biases by one tensor each."""
    result: dict[str, StoredTensor] = dict(plain)
    for name in tensors.keys() & plain.keys():
        weight, stem = plain[name], name.removesuffix(".weight")
        scales, biases = plain.get(f"{stem}.scales"), plain.get(f"{stem}.biases")
        if weight.dtype == np.uint32:
            if mlx is None or scales is None or biases is None:
                missing = "quantization in config.json" if mlx is None else f"{stem}.scales and {stem}.biases"
                raise CheckpointError(f"{weight.file}: {name}: is packed, and {missing} is missing")
            result[name] = MlxTensor(weight, scales, biases, *mlx)
            del result[f"{stem}.scales"], result[f"{stem}.biases"]
        elif weight.dtype.itemsize == 1:
            scale = plain.get(f"{name}_scale")
            if scale is None:
                raise CheckpointError(f"{weight.file}: {name}: is FP8, and {name}_scale is missing")
            result[name] = Fp8Tensor(weight, scale, len(tensors[name].parts))
            del result[f"{name}_scale"]
    for name in tensors.keys() & result.keys():
        if problem := result[name].problem():
            raise CheckpointError(f"{result[name].files[0]}: {name}: {problem}")
    return result


def _check_tensors(folder: Path, tensors: Mapping[str, SourceTensor], stored: Mapping[str, StoredTensor]) -> None:
    """Checks names, shapes and dtypes of the stored tensors against those that the configuration asks for."""
    if missing := [name for name in tensors if name not in stored]:
        raise CheckpointError(f"{folder}: {missing[0]} is missing{and_more(missing)}")
    if unknown := [name for name in stored if name not in tensors]:
        raise CheckpointError(
            f"{stored[unknown[0]].files[0]}: {unknown[0]} is not a tensor of this DBRX{and_more(unknown)}; "
            "compare config.json with where the files come from"
        )
    for name, tensor in tensors.items():
        file = stored[name].files[0]
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {name}: config.json asks for shape {tensor.shape}, got {stored[name].shape}"
            )
        if stored[name].dtype.name not in FLOATS:
            raise CheckpointError(f"{file}: {name}: expected dtype {', '.join(FLOATS)}, got {stored[name].dtype}")
