"""Writes parameters as a Hugging Face folder in the published (fused) layout, which transformers reads."""

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dbrx_jax.checkpoint.copy_rows import Progress, append_rows, byte_progress, not_finite
from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block
from dbrx_jax.checkpoint.huggingface import INDEX
from dbrx_jax.checkpoint.layouts import FUSED, SourceTensor, expand
from dbrx_jax.checkpoint.raw_arrays import write_all, writing
from dbrx_jax.checkpoint.work_folder import parallel

SHARD = 5_000_000_000  # bytes, as the published files
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_shards(
    checkpoint: CheckpointFolder,
    folder: Path,
    dtype: np.dtype,
    max_shard_size: int = SHARD,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes all parameters, dequantised, and the index, except files that a killed run has completed.

    Returns the number of infinite or NaN values of each parameter that has any.
    """
    config, advance = checkpoint.config, byte_progress(checkpoint, progress)
    shards = plan_shards(expand(FUSED, config), dtype, max_shard_size)
    bad: Counter[str] = Counter()

    def write(shard: Shard) -> None:
        if not (folder / shard.file).exists():
            bad.update(_write_shard(checkpoint, folder / shard.file, shard, dtype, advance))
            return
        for part in (p for tensor in shard.tensors.values() for p in tensor.parts):
            bad[part.parameter] += not_finite(checkpoint, part.parameter, dtype)
        advance(shard.size(dtype) // dtype.itemsize)

    parallel(write, shards, workers)
    if len(shards) > 1:
        write_index(folder / INDEX, shards, config.total_parameters, dtype)
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
