"""Loading a model from a folder: one that dbrx-convert wrote, or a Hugging Face folder."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from dbrx_jax.config import DTYPES
from dbrx_jax.convert.folder import CheckpointFolder, open_folder
from dbrx_jax.convert.layouts import stored_shape
from dbrx_jax.errors import CheckpointError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.hub import checkpoint_folder
from dbrx_jax.model.causal_lm import DbrxForCausalLM
from dbrx_jax.parameters import ParameterSpec, PlacedArray, model_from_arrays, parameter_specs, placed_arrays
from dbrx_jax.recipes import find_mesh
from dbrx_jax.sharding import check_mesh
from dbrx_jax.tokenizer import stop_tokens

READERS = 4  # threads


def load_model(
    path: str | Path, mesh: Mesh | str | None = None, dtype: DTypeLike | None = None, all_to_all: bool = False
) -> DbrxForCausalLM:
    """As :meth:`DbrxForCausalLM.from_pretrained`."""
    path = checkpoint_folder(path)
    if dtype is not None and str(np.dtype(dtype)) not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    folder = open_folder(path)
    target = np.dtype(folder.dtype() if dtype is None else dtype)
    if isinstance(mesh, str):
        mesh = find_mesh(mesh)
    if mesh is not None:
        check_mesh(folder.config, mesh)
    specs, placed = parameter_specs(folder.config), placed_arrays(folder.config, mesh)

    def read(name: str) -> jax.Array:
        if mesh is None:
            return jax.device_put(_read(folder, name, specs[name], target))
        return _read_shards(folder, placed[name], specs, target, mesh)

    with ThreadPoolExecutor(READERS) as pool:
        arrays = dict(zip(placed, pool.map(read, placed), strict=True))
    config = dataclasses.replace(folder.config, dtype=target.name)
    model = model_from_arrays(config, arrays, mesh, all_to_all)
    model.generation_config = _generation_config(path)
    return model


def _read(
    folder: CheckpointFolder, name: str, spec: ParameterSpec, dtype: np.dtype, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Some rows of a parameter (along its first dimension) in memory, from which a CPU uses them."""
    factor = stored_shape(spec)[0] // spec.shape[0]
    stop = spec.shape[0] if stop is None else stop
    rows = folder.rows(name, start * factor, stop * factor)
    return np.ascontiguousarray(rows.astype(dtype, copy=False)).reshape(stop - start, *spec.shape[1:])


def _read_shards(
    folder: CheckpointFolder,
    placed: PlacedArray,
    specs: Mapping[str, ParameterSpec],
    dtype: np.dtype,
    mesh: Mesh,
) -> jax.Array:
    """An array on a mesh: of each shard that belongs to a device here, its rows are read and its columns kept."""
    shards: dict[tuple, np.ndarray] = {}  # by place: copies of a shard are read once

    def shard(index: Any) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, placed.shape, strict=True)]
        if (key := tuple(bounds)) not in shards:
            if len(placed.parameters) > 1:
                (first, last), *rest = bounds
                parts = [_part(folder, name, specs[name], dtype, rest) for name in placed.parameters[first:last]]
                shards[key] = np.stack(parts)
            else:
                shards[key] = _part(folder, placed.parameters[0], specs[placed.parameters[0]], dtype, bounds)
        return shards[key]

    return jax.make_array_from_callback(placed.shape, NamedSharding(mesh, placed.spec), shard)


def _part(
    folder: CheckpointFolder, name: str, spec: ParameterSpec, dtype: np.dtype, bounds: list[tuple[int, int]]
) -> np.ndarray:
    """A block of a parameter, with zeros in rows that lie behind its end."""
    (start, stop), *rest = bounds
    last = min(stop, spec.shape[0])
    columns = tuple(slice(*b) for b in rest)
    if last <= start:
        return np.zeros([b - a for a, b in bounds], dtype)
    block = np.ascontiguousarray(_read(folder, name, spec, dtype, start, last)[(slice(None), *columns)])
    if last == stop:
        return block
    return np.concatenate([block, np.zeros((stop - last, *block.shape[1:]), dtype)])


def _generation_config(path: Path) -> GenerationConfig:
    """generation_config.json's, and what it does not say from the tokenizer's configuration."""
    file = path / "generation_config.json"
    given = GenerationConfig.from_file(file) if file.exists() else GenerationConfig()
    eos, pad = stop_tokens(path)
    return GenerationConfig(given.eos_token_ids or eos, pad if given.pad_token_id is None else given.pad_token_id)
