"""ModelFolder: a model in memory, read as if it were a checkpoint's folder, a block of rows at a time."""

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs
from dbrx_jax.checkpoint.quantized import read_dequantized
from dbrx_jax.errors import CheckpointError
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.quantization import Quantization

_DONE, _FAILED = -1, -2  # in place of an array's number

_slice = jax.jit(lax.dynamic_slice, static_argnums=2)


class ModelFolder:
    """The weights of a model as a :class:`CheckpointFolder`, sharded or not.

    Blocks of rows come from the shards of their array, which stays where it is. Where the shards belong to several
    processes, only process 0 reads, within :meth:`leading`; the others must be in :meth:`follow` meanwhile.
    """

    path = Path()
    description = "a model in memory"

    def __init__(self, model: CausalLM):
        self.config = model.config
        self.quantization: Quantization | None = model.quantization
        self._dtype = np.dtype(model.dtype)
        self._arrays: list[jax.Array] = []
        self._locations: dict[tuple[str, str], tuple[int, int]] = {}  # number of the array, and index in its stack
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        values = {".".join(map(str, path)): leaf.get_value() for path, leaf in state}
        layouts = array_layouts(self.config, model.partition.mesh, self.quantization, self._dtype)
        for name, layout in layouts.items():
            for part, _, _ in layout.leaves():
                for index, parameter in enumerate(layout.parameters):
                    stacked = len(layout.parameters) > 1
                    self._locations[parameter, part] = len(self._arrays), index if stacked else -1
                self._arrays.append(getattr(values[name], part) if part else values[name])
        self.is_shared = not all(array.is_fully_addressable for array in self._arrays)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in self._arrays)

    @property
    def files(self) -> list[Path]:
        return []

    def dtype(self) -> np.dtype:
        return self._dtype

    def parameter_dtype(self, parameter: str) -> np.dtype:
        return self._dtype

    def pieces(self, parameter: str, start: int, stop: int) -> None:
        return None

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        spec = parameter_specs(self.config)[parameter]
        shape = stored_shape(spec)
        factor = shape[0] // spec.shape[0]  # published rows per row of the array
        first, last = start // factor, -(-stop // factor)
        format = self.quantization.format_of(parameter) if self.quantization else None
        if format is None:
            rows = self.stored_rows(parameter, "", first, last)
        else:
            rows = read_dequantized(self, parameter, spec.quantized(format, self._dtype), first, last)
        return rows.reshape(-1, *shape[1:])[start - first * factor : stop - first * factor]

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        request = [*self._locations[parameter, part], start, stop]
        if not self.is_shared:
            return self._read(request)
        with self._lock:
            return self._read(_broadcast(request))

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Lets process 0 read in the block; ends :meth:`follow` in the others, with an error if the block raises."""
        end = _FAILED
        try:
            yield
            end = _DONE
        finally:
            if self.is_shared:
                _broadcast([end, 0, 0, 0])

    def follow(self) -> None:
        """Contributes this process' shards to what process 0 reads, until that has done.

        Raises:
          CheckpointError: process 0 has failed.
        """
        while (request := _broadcast([0, 0, 0, 0]))[0] >= 0:
            self._read(request)
        if request[0] == _FAILED:
            raise CheckpointError("process 0 could not save the model; its own error says why")

    def _read(self, request: Sequence[int]) -> np.ndarray:
        """Reads rows (start, stop) of an array by its number, or of one element of a stack."""
        number, index, start, stop = request
        array = self._arrays[number]
        bounds = [(0, n) for n in array.shape]
        if index >= 0:
            bounds[:2] = [(index, index + 1), (start, stop)]
        else:
            bounds[0] = (start, stop)
        block = np.zeros([last - first for first, last in bounds], array.dtype)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:  # one of all devices
                _copy_overlap(shard, array.shape, bounds, block)
        block = _sum_over_processes(block) if self.is_shared else block
        return block[0] if index >= 0 else block


def _copy_overlap(
    shard: jax.Shard, shape: tuple[int, ...], bounds: Sequence[tuple[int, int]], block: np.ndarray
) -> None:
    """Copies what a shard of an array has of the block with these bounds."""
    origins = [part.indices(n)[0] for part, n in zip(shard.index, shape, strict=True)]
    firsts = [max(a, first) for a, (first, _) in zip(origins, bounds, strict=True)]
    lasts = [min(a + n, last) for a, n, (_, last) in zip(origins, shard.data.shape, bounds, strict=True)]
    sizes = tuple(last - first for first, last in zip(firsts, lasts, strict=True))
    if min(sizes) <= 0:
        return
    begin = [first - origin for first, origin in zip(firsts, origins, strict=True)]
    target = tuple(slice(first - b, last - b) for first, last, (b, _) in zip(firsts, lasts, bounds, strict=True))
    # Only the slice goes to the host: an array that numpy has read would keep its copy there.
    block[target] = np.asarray(_slice(shard.data, begin, sizes))


def _broadcast(request: Sequence[int]) -> list[int]:
    """Returns process 0's request in every process."""
    return multihost_utils.broadcast_one_to_all(np.asarray(request, np.int32)).tolist()


def _sum_over_processes(block: np.ndarray) -> np.ndarray:
    """Joins the blocks of all processes, of which each has zeros where another has its elements."""
    data = block.view(np.uint8).reshape(1, -1)
    mesh = _mesh_of_processes()
    parts = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("processes")), data)
    total = _sum(parts, NamedSharding(mesh, PartitionSpec()))
    return np.asarray(total.addressable_data(0)).view(block.dtype).reshape(block.shape)


@functools.cache
def _mesh_of_processes() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("processes", "devices"))


@functools.partial(jax.jit, static_argnums=1)
def _sum(parts: jax.Array, sharding: NamedSharding) -> jax.Array:
    return lax.with_sharding_constraint(parts.sum(0, dtype=np.uint8), sharding)
