"""Converts a checkpoint to a Hugging Face folder in the published (fused) layout, which transformers reads."""

import dataclasses
import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from dbrx_convert.move import append_rows, not_finite
from dbrx_convert.to_orbax import copy_companions
from dbrx_convert.work import fingerprint, parallel, work_folder
from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block
from dbrx_jax.checkpoint.huggingface import INDEX
from dbrx_jax.checkpoint.layouts import FUSED, SourceTensor, expand
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import parameters_of
from dbrx_jax.checkpoint.raw_arrays import write_all, writing
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import location, read_json
from dbrx_jax.quantization import QuantizedArray

SHARD = 5_000_000_000  # bytes, as the published files
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def to_hf(
    source: str | Path,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    max_shard_size: int = SHARD,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Converts a checkpoint of either kind to a Hugging Face folder in the published layout.

    The destination appears when it is complete; a conversion that was killed is continued, file by
    file, by calling this again.

    Returns how many values of each parameter are infinite or NaN, where any are.

    Args:
      source: an Orbax checkpoint of dbrx-convert's, or a Hugging Face folder in any published layout.
        Either may be the URL of a file system that fsspec knows, such as gs://bucket/folder.
      destination: a folder that does not exist yet.
      dtype: to cast the weights to; by default they stay as they are. Quantised weights are dequantised, to the
        dtype of their scales by default.
      max_shard_size: bytes of a file, unless one tensor is larger.
      workers: threads; as many as there are CPUs, at most 4, by default.
      progress: called with numbers of bytes as they are written.

    Raises:
      CheckpointError: the source is not a whole checkpoint or changed since a run that was killed,
        the destination exists, or the disk is too small.
      ConfigError: the source's config.json is missing or cannot be used.
    """
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size: expected a size above 0, got {max_shard_size}")
    source, destination = location(source), location(destination)
    checkpoint = open_folder(source)
    target = np.dtype(checkpoint.dtype() if dtype is None else dtype)
    options = {"kind": "to-hf", "dtype": target.name, "max_shard_size": max_shard_size}
    size = checkpoint.config.total_parameters * target.itemsize
    bad: Counter[str] = Counter()
    with work_folder(destination, {**options, "source": fingerprint(checkpoint)}, size) as folder:
        shards = plan_shards(expand(FUSED, checkpoint.config), target, max_shard_size)

        def write(shard: Shard) -> None:
            if not (folder / shard.file).exists():
                bad.update(_write_shard(checkpoint, folder / shard.file, shard, target, progress))
                return
            for part in (p for tensor in shard.tensors.values() for p in tensor.parts):
                bad[part.parameter] += not_finite(checkpoint, part.parameter, target)
            if progress is not None:
                progress(shard.size(target))

        parallel(write, shards, workers)
        if len(shards) > 1:
            _write_index(folder / INDEX, shards, checkpoint.config.total_parameters, target)
        config = {**checkpoint.config.to_dict(), **_kept(source), "torch_dtype": target.name}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(source, folder)
    return {name: count for name, count in sorted(bad.items()) if count}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file and its tensors, in order."""

    file: str
    tensors: dict[str, SourceTensor]

    def size(self, dtype: np.dtype) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values()) * dtype.itemsize


def plan_shards(tensors: dict[str, SourceTensor], dtype: np.dtype, largest: int) -> list[Shard]:
    """Tensors in the model's order, block by block, in files of at most `largest` bytes where a tensor allows."""

    def place(name: str) -> tuple[int, int]:
        parts = name.split(".")
        order = list(tensors).index(name)
        if parts[1] == "blocks":
            return int(parts[2]) + 1, order
        return (0, 0) if parts[1] == "wte" else (len(tensors), order)

    files: list[dict[str, SourceTensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=place):
        nbytes = math.prod(tensors[name].shape) * dtype.itemsize
        if files[-1] and size + nbytes > largest:
            files.append({})
            size = 0
        files[-1][name] = tensors[name]
        size += nbytes
    if len(files) == 1:
        return [Shard("model.safetensors", files[0])]
    return [Shard(f"model-{i:05}-of-{len(files):05}.safetensors", f) for i, f in enumerate(files, 1)]


def _write_shard(
    checkpoint: CheckpointFolder, file: Path, shard: Shard, dtype: np.dtype, progress: Callable[[int], None] | None
) -> Counter[str]:
    """One safetensors file (the length of its header, the header, the tensors); counts what is not finite."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in shard.tensors.items():
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype.name], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    bad: Counter[str] = Counter()
    with writing(file) as f:
        write_all(f, np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8))
        for tensor in shard.tensors.values():
            for part in tensor.parts:
                rows, step = part.stop - part.start, rows_per_block(tensor.shape, dtype.itemsize)
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    bad[part.parameter] += append_rows(checkpoint, part.parameter, start, stop, dtype, f)
                    if progress is not None:
                        progress((stop - start) * math.prod(tensor.shape[1:]) * dtype.itemsize)
    return bad


def _write_index(path: Path, shards: list[Shard], parameters: int, dtype: np.dtype) -> None:
    index = {
        "metadata": {"total_parameters": parameters, "total_size": sum(s.size(dtype) for s in shards)},
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name in shard.tensors)),
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def _kept(source: Path) -> dict[str, object]:
    """The source's config.json, without what was true of its weights alone."""
    lost = ("dtype", "quantization", "quantization_config")
    return {key: value for key, value in read_json(source / "config.json").items() if key not in lost}


def write_model(model: DbrxForCausalLM, folder: Path) -> None:
    """Writes a small model in memory as config.json and one model.safetensors."""
    parameters = parameters_of(model)
    tensors = {}
    for name, source in expand(FUSED, model.config).items():
        parts = [_plain(parameters[p.parameter]).reshape(p.stop - p.start, *source.shape[1:]) for p in source.parts]
        tensors[name] = np.concatenate(parts)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def _plain(parameter: Any) -> np.ndarray:
    return np.asarray(parameter.dequantize() if isinstance(parameter, QuantizedArray) else parameter)
