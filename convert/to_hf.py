"""Converts a checkpoint to a Hugging Face folder in the published (fused) layout, which transformers reads."""

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from dbrx_convert.move import Progress, append_rows, byte_progress, not_finite
from dbrx_convert.to_orbax import write_companions
from dbrx_convert.work import fingerprint, parallel, work_folder
from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block
from dbrx_jax.checkpoint.huggingface import INDEX
from dbrx_jax.checkpoint.layouts import FUSED, SourceTensor, expand
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import parameters_of
from dbrx_jax.checkpoint.raw_arrays import write_all, writing
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import location
from dbrx_jax.quantization import QuantizedArray

SHARD = 5_000_000_000  # bytes, as the published files
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


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
      ConfigError: the source's config.json is missing or cannot be used.
    """
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size: expected a size above 0, got {max_shard_size}")
    source, destination = location(source), location(destination)
    checkpoint = open_folder(source)
    config = checkpoint.config
    target_dtype = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    options = {"kind": "to-hf", "dtype": target_dtype.name, "max_shard_size": max_shard_size}
    num_bytes = config.total_parameters * target_dtype.itemsize
    advance = byte_progress(checkpoint, progress)
    bad: Counter[str] = Counter()
    with work_folder(destination, {**options, "source": fingerprint(checkpoint)}, num_bytes) as folder:
        shards = plan_shards(expand(FUSED, config), target_dtype, max_shard_size)

        def write(shard: Shard) -> None:
            if not (folder / shard.file).exists():
                bad.update(_write_shard(checkpoint, folder / shard.file, shard, target_dtype, advance))
                return
            for part in (p for tensor in shard.tensors.values() for p in tensor.parts):
                bad[part.parameter] += not_finite(checkpoint, part.parameter, target_dtype)
            advance(shard.size(target_dtype) // target_dtype.itemsize)

        parallel(write, shards, workers)
        if len(shards) > 1:
            write_index(folder / INDEX, shards, config.total_parameters, target_dtype)
        write_companions(source, folder, target_dtype, config.to_dict())
    return {name: count for name, count in sorted(bad.items()) if count}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Name of a safetensors file, and its tensors in order."""

    file: str
    tensors: dict[str, SourceTensor]

    def size(self, dtype: np.dtype) -> int:
        """Returns the bytes of the tensors in `dtype`."""
        return sum(math.prod(t.shape) for t in self.tensors.values()) * dtype.itemsize

    def header(self, dtype: np.dtype) -> bytes:
        """Returns the bytes before the first tensor in `dtype`: the header's length, and the header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + math.prod(tensor.shape) * dtype.itemsize
            kind = _SAFETENSORS_DTYPES[dtype.name]
            header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        return struct.pack("<Q", len(text)) + text


def plan_shards(tensors: dict[str, SourceTensor], dtype: np.dtype, largest: int) -> list[Shard]:
    """Distributes tensors, in the order of the model's blocks, over files of at most `largest` bytes.

    A tensor larger than that gets a file of its own.
    """
    indices = {name: index for index, name in enumerate(tensors)}

    def model_order(name: str) -> tuple[int, int]:
        parts = name.split(".")
        if parts[1] == "blocks":
            return int(parts[2]) + 1, indices[name]
        return (0, 0) if parts[1] == "wte" else (len(tensors), indices[name])

    files: list[dict[str, SourceTensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=model_order):
        num_bytes = math.prod(tensors[name].shape) * dtype.itemsize
        if files[-1] and size + num_bytes > largest:
            files.append({})
            size = 0
        files[-1][name] = tensors[name]
        size += num_bytes
    if len(files) == 1:
        return [Shard("model.safetensors", files[0])]
    return [Shard(f"model-{i:05}-of-{len(files):05}.safetensors", f) for i, f in enumerate(files, 1)]


def _write_shard(
    checkpoint: CheckpointFolder, file: Path, shard: Shard, dtype: np.dtype, advance: Callable[[int], None]
) -> Counter[str]:
    """Writes a safetensors file, advancing by weights; returns the number of infinite or NaN values by parameter."""
    bad: Counter[str] = Counter()
    with writing(file) as f:
        write_all(f, np.frombuffer(shard.header(dtype), np.uint8))
        for tensor in shard.tensors.values():
            step = rows_per_block(tensor.shape, dtype.itemsize)
            row_size = math.prod(tensor.shape[1:])
            for part in tensor.parts:
                num_rows = part.stop - part.start
                for start in range(0, num_rows, step):
                    stop = min(start + step, num_rows)
                    bad[part.parameter] += append_rows(checkpoint, part.parameter, start, stop, dtype, f)
                    advance((stop - start) * row_size)
    return bad


def write_index(path: Path, shards: list[Shard], num_parameters: int, dtype: np.dtype) -> None:
    """Writes the index of a checkpoint: each tensor's file, the model's parameters, and their bytes in `dtype`."""
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": sum(s.size(dtype) for s in shards)},
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name in shard.tensors)),
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def write_model(model: DbrxForCausalLM, folder: Path) -> None:
    """Writes a small model in memory as config.json and one model.safetensors."""
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in parameters_of(model).items():
        arrays[name] = np.asarray(parameter.dequantize() if isinstance(parameter, QuantizedArray) else parameter)
    tensors = {}
    for name, tensor in expand(FUSED, model.config).items():
        parts = [arrays[p.parameter].reshape(p.stop - p.start, *tensor.shape[1:]) for p in tensor.parts]
        tensors[name] = np.concatenate(parts)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
