"""Loading a model from a folder: one that dbrx-convert wrote, or a Hugging Face folder."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dbrx_jax.checkpoint.folder import CheckpointFolder
from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import Network, array_layouts, model_from_arrays, parameter_specs
from dbrx_jax.checkpoint.quantized import read_quantized
from dbrx_jax.config import DTYPES
from dbrx_jax.errors import CheckpointError
from dbrx_jax.kernels.attention import select_implementation
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.sharding.partition import Partition, check_mesh
from dbrx_jax.sharding.recipes import find_mesh

READERS = 4  # threads


def load_model(
    network: type[Network],
    path: Path,
    mesh: Mesh | str | None,
    dtype: DTypeLike | None,
    quantization: str | Quantization | None,
    all_to_all: bool,
    attention_implementation: str | None,
) -> Network:
    """Loads a checkpoint into a network of this class; see :meth:`dbrx_jax.DbrxForCausalLM.from_pretrained`."""
    if dtype is not None and str(np.dtype(dtype)) not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    asked = Quantization.parse(quantization)
    folder = open_folder(path)
    stored_quantization = folder.quantization
    if asked is not None and stored_quantization is not None and asked != stored_quantization:
        raise CheckpointError(
            f"{path}: its weights are {stored_quantization} already, and {asked} is asked for; "
            "load what it was made from"
        )
    use = stored_quantization if asked is None else asked
    target = np.dtype(folder.dtype() if dtype is None else dtype)
    if isinstance(mesh, str):
        mesh = find_mesh(mesh)
    if mesh is not None:
        check_mesh(folder.config, mesh)
    select_implementation(attention_implementation, Partition(mesh).platform)  # or raises, before anything is read
    placed = array_layouts(folder.config, mesh, use, target)

    def read(name: str) -> Any:
        array = placed[name]
        forms = [None if use is None else use.format_of(parameter) for parameter in array.parameters]
        readers = [_Reader(folder, p, form, target) for p, form in zip(array.parameters, forms, strict=True)]
        found = {part: _array(readers, part, shape, spec, mesh) for part, shape, spec in array.leaves()}
        return dataclasses.replace(array.value, **found) if "values" in found else found[""]

    with ThreadPoolExecutor(READERS) as pool:
        arrays = dict(zip(placed, pool.map(read, placed), strict=True))
    config = dataclasses.replace(folder.config, dtype=target.name)
    return model_from_arrays(
        network,
        config,
        arrays,
        mesh,
        quantization=use,
        all_to_all=all_to_all,
        attention_implementation=attention_implementation,
    )


class _Reader:
    """A parameter's rows (along its first dimension) in memory, from which a CPU uses them.

    What is quantised here is kept, so that neither scales nor other devices' parts take doing it again.
    """

    def __init__(self, folder: CheckpointFolder, name: str, form: Format | None, dtype: np.dtype):
        self.folder, self.name, self.form, self.dtype = folder, name, form, dtype
        self.spec = parameter_specs(folder.config)[name]
        self.made: dict[tuple[int, int], QuantizedArray] = {}

    def shape(self, part: str) -> tuple[int, ...]:
        if self.form is None:
            return self.spec.shape
        return tuple(getattr(self.spec.quantized(self.form, self.dtype), part).shape)

    def rows(self, part: str, start: int, stop: int) -> np.ndarray:
        """Rows of the parameter (part ""), or of its "values" or "scale"."""
        if self.form is None:
            factor = stored_shape(self.spec)[0] // self.spec.shape[0]
            rows = self.folder.rows(self.name, start * factor, stop * factor).astype(self.dtype, copy=False)
        elif self.folder.quantization is not None:
            rows = self.folder.stored_rows(self.name, part, start, stop)
            rows = rows.astype(self.dtype, copy=False) if part == "scale" else rows
        elif -len(self.spec.shape) in self.spec.contracted:
            rows = getattr(self._quantized(0, self.spec.shape[0]), part)[start:stop]
        else:
            rows = getattr(self._quantized(start, stop), part)
        return np.ascontiguousarray(rows).reshape(stop - start, *self.shape(part)[1:])

    def _quantized(self, start: int, stop: int) -> QuantizedArray:
        assert self.form is not None
        if (start, stop) not in self.made:
            made = read_quantized(self.folder, self.name, self.form, self.dtype, start, stop)
            self.made[start, stop] = made
        return self.made[start, stop]


def _array(
    readers: list[_Reader], part: str, shape: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: Mesh | None
) -> jax.Array:
    """An array of a model: of each shard that belongs to a device here, its rows are read and its columns kept."""
    if mesh is None:
        if len(readers) == 1:
            return jax.device_put(readers[0].rows(part, 0, shape.shape[0]))
        return jax.device_put(_together(readers, part, [(0, n) for n in shape.shape[1:]], shape.dtype))
    shards: dict[tuple, np.ndarray] = {}  # by place: copies of a shard are read once

    def shard(index: Any) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape.shape, strict=True)]
        if (key := tuple(bounds)) not in shards:
            if len(readers) > 1:
                (first, last), *rest = bounds
                shards[key] = _together(readers[first:last], part, rest, shape.dtype)
            else:
                shards[key] = _block(readers[0], part, bounds, shape.dtype)
        return shards[key]

    return jax.make_array_from_callback(shape.shape, NamedSharding(mesh, spec), shard)


def _together(readers: list[_Reader], part: str, bounds: list[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
    """Stacks the same block of several parameters, reading one after another to save memory."""
    array = np.empty((len(readers), *(b - a for a, b in bounds)), dtype)
    for i, reader in enumerate(readers):
        array[i] = _block(reader, part, bounds, dtype)
    return array


def _block(reader: _Reader, part: str, bounds: list[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
    """A block of a parameter, with zeros in rows past its end."""
    (start, stop), *rest = bounds
    last = min(stop, reader.shape(part)[0])
    if last <= start:
        return np.zeros([b - a for a, b in bounds], dtype)
    columns = tuple(slice(*b) for b in rest)
    block = np.ascontiguousarray(reader.rows(part, start, last)[(slice(None), *columns)])
    if last == stop:
        return block
    return np.concatenate([block, np.zeros((stop - last, *block.shape[1:]), dtype)])
