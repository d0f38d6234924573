"""A Hugging Face folder of safetensors files: checked as a whole before any of it is used."""

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

from dbrx_jax.checkpoint.layouts import Layout, SourceTensor, expand, recognise
from dbrx_jax.checkpoint.stored_tensors import Fp8Tensor, MlxTensor, PlainTensor, StoredTensor
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import CheckpointError, ConfigError
from dbrx_jax.files import is_remote, location, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U32": np.dtype(np.uint32),  # MLX's packed weights
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
MAX_HEADER = 100_000_000  # bytes, as safetensors has it
FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """A checkpoint in a published layout, complete and of the sizes that its config.json gives."""

    path: Path
    config: DbrxConfig
    layout: Layout
    tensors: dict[str, SourceTensor]  # what the layout says of each
    stored: dict[str, StoredTensor]
    packing: str | None  # how weights are quantised, in words
    places: dict[str, tuple[str, int, int]]  # parameter -> tensor, first row, row behind the last

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads config.json, the index and every file's header.

        Raises:
          CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of the
            wrong shape or dtype; the first one is named.
          ConfigError: config.json is missing or cannot be used.
        """
        folder = location(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        config = DbrxConfig.from_file(folder / "config.json")
        try:
            plain, total_size = _read_folder(folder)
            quantization = _mlx_quantization(read_json(folder / "config.json"))
        except ConfigError as error:  # what cannot be read, said in the checkpoint's words
            raise CheckpointError(str(error)) from None
        layout = recognise(plain)
        tensors = expand(layout, config)
        stored = _join_quantized(plain, tensors, quantization)
        _compare(folder, tensors, stored)
        size = sum(t.nbytes for t in plain.values())
        if total_size is not None and total_size != size:
            raise CheckpointError(
                f"{folder / INDEX}: total_size is {total_size!r:.40} and the tensors have {size} bytes; "
                "find the right files, or mend that number"
            )
        kinds = {t.quantization for t in stored.values() if t.quantization}
        places = {p.parameter: (name, p.start, p.stop) for name, tensor in tensors.items() for p in tensor.parts}
        return cls(folder, config, layout, tensors, stored, ", ".join(sorted(kinds)) or None, places)

    @property
    def description(self) -> str:
        """The layout, and how weights are quantised."""
        return f"{self.layout.name} layout" + (f", {self.packing}" if self.packing else "")

    @property
    def quantization(self) -> None:
        """None: tensors that such a folder stores quantised are dequantised when they are read."""
        return None

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({file for tensor in self.stored.values() for file in tensor.files})

    @property
    def size(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def dtype(self) -> np.dtype:
        """The one dtype of all weights, after dequantising.

        Raises:
          CheckpointError: they have several.
        """
        dtypes = {t.dtype: name for name, t in self.stored.items()}
        if len(dtypes) > 1:
            found = " and ".join(f"{dtype} ({name})" for dtype, name in list(dtypes.items())[:2])
            raise CheckpointError(f"{self.path}: holds tensors of {found}; choose one with dtype, such as bfloat16")
        return next(iter(dtypes))

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self.stored[self.places[parameter][0]].dtype

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows of a parameter in its published two-dimensional shape, read into memory.

        Raises:
          CheckpointError: the file has become shorter since it was opened.
        """
        name, first, last = self.places[parameter]
        if self.tensors[name].transposed:
            return self.stored[name].rows(0, self.tensors[name].shape[0]).T[start:stop]
        return self.stored[name].rows(first + start, min(first + stop, last))

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError("nothing here is quantised in the project's own way")

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        """File, offset and length of the bytes of some rows, if they are stored in the needed form; else None."""
        name, first, _ = self.places[parameter]
        stored = self.stored[name]
        if not isinstance(stored, PlainTensor) or self.tensors[name].transposed:
            return None
        return [(stored.file, stored.offset + (first + start) * stored.row_bytes, (stop - start) * stored.row_bytes)]


def _read_folder(folder: Path) -> tuple[dict[str, PlainTensor], Any]:
    """Every tensor of the folder, and the index's total_size where there is one."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no *.safetensors files")
        found: dict[str, PlainTensor] = {}
        for file in files:
            for name, tensor in _read_header(folder, file.name).items():
                if name in found:
                    raise CheckpointError(f"{name}: is in both {found[name].file.name} and {file.name} in {folder}")
                found[name] = tensor
        return found, None
    weight_map, total_size = _read_index(folder / INDEX)
    headers = {name: _read_header(folder, name) for name in sorted(set(weight_map.values()))}
    for home, header in headers.items():
        for name in header:
            if weight_map.get(name) != home:
                raise CheckpointError(f"{folder / home}: holds {name}, which {INDEX} does not place there")
    for name, home in weight_map.items():
        if name not in headers[home]:
            raise CheckpointError(f"{folder / home}: does not hold {name}, which {INDEX} places there")
    return {name: headers[home][name] for name, home in weight_map.items()}, total_size


def _read_index(path: Path) -> tuple[dict[str, str], Any]:
    """weight_map and metadata.total_size."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object weight_map from tensors to files")
    for name, file in weight_map.items():
        # A plain name in this folder: neither a path nor a way out of it.
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
    """The tensors of one file; safetensors' own library checks the header against the file first."""
    file = folder / name
    try:
        check_link(folder, file)
        if not file.is_file():
            raise CheckpointError(f"{file}: there is no such file")
        header, length = _checked_header(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); download or copy it again") from None
    header.pop("__metadata__", None)
    result = {}
    for tensor, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {tensor}: expected dtype F32, BF16 or F16, got {entry['dtype']}")
        offset = 8 + length + entry["data_offsets"][0]
        result[tensor] = PlainTensor(file, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return result


def _checked_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header and its length in bytes, when safetensors' own library finds the file whole."""
    with file.open("rb") as f:
        begin = f.read(8)
        (length,) = struct.unpack("<Q", begin.ljust(8, b"\0"))
        if not is_remote(file):
            with safe_open(file, "numpy"):
                pass
            return json.loads(f.read(length)), length
        text = f.read(min(length, MAX_HEADER))
    # The library reads local files alone: one with the same header, and nothing where the tensors are.
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as local:
        local.write(begin + text)
        local.truncate(file.stat().st_size)
        local.flush()
        with safe_open(local.name, "numpy"):
            pass
    return json.loads(text), length


def check_link(folder: Path, file: Path) -> None:
    """A link may lead within the folder, or into blobs/ as in the hub's cache, and nowhere else.

    Raises:
      CheckpointError: it leads elsewhere.
    """
    if not file.is_symlink():
        return
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.parent == blobs):
        raise CheckpointError(f"{file}: is a link out of the folder, to {target}; put the file itself there")


def _mlx_quantization(config: Any) -> tuple[int, int] | None:
    """Bits and group size of MLX's affine quantisation, from config.json.

    Raises:
      CheckpointError: they are of a kind that is not known here.
    """
    entry = config.get("quantization")
    if entry is None:
        return None
    bits, group = (entry.get("bits"), entry.get("group_size")) if isinstance(entry, Mapping) else (None, None)
    if bits not in (2, 4, 8) or group not in (32, 64, 128):
        raise CheckpointError(
            f"config.json: quantization: expected bits 2, 4 or 8 and group_size 32, 64 or 128, got {entry!r:.80}"
        )
    return bits, group


def _join_quantized(
    plain: dict[str, PlainTensor], tensors: dict[str, SourceTensor], mlx: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    """Weights together with the scales that belong to them."""
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


def _compare(folder: Path, tensors: Mapping[str, SourceTensor], stored: Mapping[str, StoredTensor]) -> None:
    """Compares the tensors of the folder with those that the configuration asks for."""
    if missing := [name for name in tensors if name not in stored]:
        raise CheckpointError(f"{folder}: {missing[0]} is missing{_more(missing)}")
    if unknown := [name for name in stored if name not in tensors]:
        raise CheckpointError(
            f"{stored[unknown[0]].files[0]}: {unknown[0]} is not a tensor of this DBRX{_more(unknown)}; "
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


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
