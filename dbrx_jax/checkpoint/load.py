"""Loads a model from an Orbax or Hugging Face folder, each shard straight to its device."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dbrx_jax.checkpoint.folder import CheckpointFolder
from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.parameters import ArrayLayout, Network, array_layouts, model_from_arrays, parameter_specs
from dbrx_jax.checkpoint.quantized import read_quantized
from dbrx_jax.config import DTYPES, DbrxConfig
from dbrx_jax.console import progress
from dbrx_jax.errors import CheckpointError, MeshError
from dbrx_jax.kernels.attention import select_implementation
from dbrx_jax.memory import report_memory_errors
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.sharding.partition import Partition, check_mesh
from dbrx_jax.sharding.recipes import find_mesh

READERS = 4  # threads


def load_model(
    network: type[Network],
    folder: CheckpointFolder,
    mesh: Mesh | str | None,
    dtype: DTypeLike | None,
    quantization: str | Quantization | None,
    all_to_all: bool,
    attention_implementation: str | None,
    show_progress: bool | None = None,
) -> Network:
    """Loads a checkpoint into a network of this class; see :meth:`dbrx_jax.DbrxForCausalLM.from_pretrained`."""
    requested, stored = Quantization.parse(quantization), folder.quantization
    if requested is not None and stored is not None and requested != stored:
        raise CheckpointError(
            f"{folder.path}: its weights are {stored} already, and {requested} is asked for; load what it was made from"
        )
    quantization = stored if requested is None else requested
    target = folder.dtype() if dtype is None else _as_dtype(dtype)
    mesh, layouts = plan_arrays(folder.config, mesh, target, quantization, attention_implementation)
    arrays = _read_arrays(folder, layouts, mesh, quantization, target, show_progress)
    config = dataclasses.replace(folder.config, dtype=target.name)
    return model_from_arrays(
        network,
        config,
        arrays,
        mesh,
        quantization=quantization,
        all_to_all=all_to_all,
        attention_implementation=attention_implementation,
    )


def plan_arrays(
    config: DbrxConfig,
    mesh: Mesh | str | None,
    dtype: DTypeLike,
    quantization: str | Quantization | None,
    attention_implementation: str | None,
) -> tuple[Mesh | None, Mapping[str, ArrayLayout]]:
    """Returns the mesh, and the arrays that a model with these options has; reads no weights.

    Raises:
      DbrxError: an option is unknown, or does not fit the configuration, the others or the devices.
    """
    dtype = _as_dtype(dtype)
    mesh = find_mesh(mesh) if isinstance(mesh, str) else mesh
    if not isinstance(mesh, Mesh | None):
        raise MeshError(f'mesh: expected a jax Mesh, a recipe or axes such as "expert=8", got {mesh!r:.40}')
    if mesh is not None:
        check_mesh(config, mesh)
    select_implementation(attention_implementation, Partition(mesh).platform)
    return mesh, array_layouts(config, mesh, Quantization.parse(quantization), dtype)


def _as_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of this name, one of DTYPES."""
    with contextlib.suppress(TypeError):  # of np.dtype: no dtype of any kind
        if str(np.dtype(dtype)) in DTYPES:
            return np.dtype(dtype)
    raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!s:.40}")


def _read_arrays(
    folder: CheckpointFolder,
    layouts: Mapping[str, ArrayLayout],
    mesh: Mesh | None,
    quantization: Quantization | None,
    dtype: np.dtype,
    show_progress: bool | None,
) -> dict[str, Any]:
    """Reads all arrays of a model to its devices, several at a time."""
    num_bytes = sum(_local_bytes(leaf, spec, mesh) for a in layouts.values() for _, leaf, spec in a.leaves())
    what = f"loading {folder.path}, {num_bytes / 1e9:,.3g} GB of {quantization or dtype.name} weights"

    def read(layout: ArrayLayout) -> Any:
        formats = [None if quantization is None else quantization.format_of(name) for name in layout.parameters]
        readers = [_ParameterReader(folder, *named, dtype) for named in zip(layout.parameters, formats, strict=True)]
        leaves = {part: _read(readers, part, leaf, spec, mesh, advance) for part, leaf, spec in layout.leaves()}
        return layout.from_leaves(leaves)

    with (
        report_memory_errors(what),
        progress("Loading", num_bytes, show_progress) as advance,
        ThreadPoolExecutor(READERS) as pool,
    ):
        arrays = dict(zip(layouts, pool.map(read, layouts.values()), strict=True))
        return jax.block_until_ready(arrays)  # a device whose memory ran out says so here


class _ParameterReader:
    """Reads rows (first dimension) of one parameter, cast or quantised to the format of the model.

    Caches what it quantises: values and scales, and the shards of several devices, come from the same rows.
    """

    def __init__(self, folder: CheckpointFolder, name: str, format: Format | None, dtype: np.dtype):
        self.folder, self.name, self.format, self.dtype = folder, name, format, dtype
        self.spec = parameter_specs(folder.config)[name]
        self.cache: dict[tuple[int, int], QuantizedArray] = {}

    def shape(self, part: str) -> tuple[int, ...]:
        if self.format is None:
            return self.spec.shape
        return tuple(getattr(self.spec.quantized(self.format, self.dtype), part).shape)

    def rows(self, part: str, start: int, stop: int) -> np.ndarray:
        """Reads rows of the parameter (part ""), or of its "values" or "scale"."""
        if self.format is None:
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
        assert self.format is not None
        if (start, stop) not in self.cache:
            rows = read_quantized(self.folder, self.name, self.format, self.dtype, start, stop)
            self.cache[start, stop] = rows
        return self.cache[start, stop]


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns start and stop of each dimension of a shard."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _local_bytes(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: Mesh | None) -> int:
    """Returns the bytes of a leaf that this process reads: replicas of a shard are read once."""
    if mesh is None:
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    indices = NamedSharding(mesh, spec).addressable_devices_indices_map(leaf.shape).values()
    shards = {_bounds(index, leaf.shape) for index in indices}
    return sum(math.prod(stop - start for start, stop in bounds) for bounds in shards) * leaf.dtype.itemsize


def _read(
    readers: list[_ParameterReader],
    part: str,
    leaf: jax.ShapeDtypeStruct,
    spec: PartitionSpec,
    mesh: Mesh | None,
    advance: Callable[[int], None],
) -> jax.Array:
    """Reads a leaf of a model's array to its devices, or on a mesh the shards of this process' devices.

    Calls `advance` with the bytes of each block that is read.
    """
    if mesh is None:
        whole = [(0, n) for n in leaf.shape]
        if len(readers) == 1:
            return jax.device_put(_read_block(readers[0], part, whole, leaf.dtype, advance))
        return jax.device_put(_read_stacked(readers, part, whole[1:], leaf.dtype, advance))
    shards: dict[tuple, np.ndarray] = {}  # by bounds: replicas of a shard are read once

    def read_shard(index: Any) -> np.ndarray:
        bounds = _bounds(index, leaf.shape)
        if bounds not in shards:
            if len(readers) > 1:
                (first, last), *rest = bounds
                shards[bounds] = _read_stacked(readers[first:last], part, rest, leaf.dtype, advance)
            else:
                shards[bounds] = _read_block(readers[0], part, bounds, leaf.dtype, advance)
        return shards[bounds]

    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), read_shard)


def _read_stacked(
    readers: list[_ParameterReader],
    part: str,
    bounds: Sequence[tuple[int, int]],
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Stacks the same block of several parameters, reading one after another to save memory."""
    array = np.empty((len(readers), *(stop - start for start, stop in bounds)), dtype)
    for i, reader in enumerate(readers):
        array[i] = _read_block(reader, part, bounds, dtype, advance)
    return array


def _read_block(
    reader: _ParameterReader,
    part: str,
    bounds: Sequence[tuple[int, int]],
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Reads a block of a parameter, with zeros for rows past its end."""
    (start, stop), *rest = bounds
    last = min(stop, reader.shape(part)[0])
    if last <= start:
        block = np.zeros([b - a for a, b in bounds], dtype)
    else:
        columns = tuple(slice(*b) for b in rest)
        block = np.ascontiguousarray(reader.rows(part, start, last)[(slice(None), *columns)])
        if last < stop:
            block = np.concatenate([block, np.zeros((stop - last, *block.shape[1:]), dtype)])
    advance(block.nbytes)
    return block
