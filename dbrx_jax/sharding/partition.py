"""Partition: mesh axes, partition specs and collectives of a model that runs under jax.shard_map.

Without a mesh every method here does nothing, so the same code runs on one device. Batch rows are split over `data`
and `fsdp`; weights over `fsdp` too, gathered when used; experts over `expert`; inner dimensions over `tensor`;
positions of the key-value cache over `expert`, round-robin.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dbrx_jax.backend import kernel_backend
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MeshError, QuantizationError
from dbrx_jax.quantization import QuantizedArray
from dbrx_jax.quantization.array import group_count
from dbrx_jax.quantization.formats import GROUPS

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp")  # split the rows of a batch
VOCAB_AXES = ("expert", "tensor")
CONTEXT_AXIS = "expert"  # position p of the cache is on device p modulo the axis' size

# Logical axis of a parameter -> mesh axes, less those that an earlier dimension of the parameter uses.
RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": VOCAB_AXES,
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "embed": ("expert", "fsdp"),
    "head_dim": (),
    "replicated": (),  # norms and routers, which are small
}
# Vocabulary entries that share one draw of random numbers; a device holds a multiple of it.
VOCAB_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model's partitioning over a mesh. Collectives are called inside :meth:`shard_map`.

    Args:
      mesh: with axes among AXES; None is one device.
      tokens_split: whether the tokens between two layers are split over `expert` too, along dimension 1
        (all-gather, compute, reduce-scatter), or are replicated over it (decode).
      all_to_all: whether split tokens are sent only to their experts' devices instead of gathered on all.
      attention: the implementation of attention, a name in :mod:`dbrx_jax.kernels.attention`; None is the
        platform's best.
    """

    mesh: Mesh | AbstractMesh | None = None
    tokens_split: bool = False
    all_to_all: bool = False
    attention: str | None = None

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu", "cuda" or "tpu"."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else jax.default_backend()

    def size(self, *axes: str) -> int:
        """Returns the number of devices along the axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    def expert_arrays(self, experts: int) -> int:
        """Returns the number of arrays that hold a layer's experts, each with equally many of every device.

        Kernels index one array. XLA would copy the experts that it selects from an array, so without kernels each
        expert of a device has an array of its own.
        """
        return 1 if kernel_backend(self.platform) else experts // self.size("expert")

    def with_tokens_split(self, tokens: int) -> "Partition":
        """Returns a partition with tokens split over `expert`, if that axis divides their number."""
        experts = self.size("expert")
        return dataclasses.replace(self, tokens_split=experts > 1 and tokens % experts == 0)

    def pad_vocabulary(self, entries: int) -> int:
        """Returns the padded vocabulary size: on a mesh, a multiple that splits evenly over the devices."""
        multiple = 1 if self.mesh is None else self.size(*VOCAB_AXES) * VOCAB_BLOCK
        return -(-entries // multiple) * multiple

    # Partition specs.

    def spec(self, axes: Sequence[str]) -> PartitionSpec:
        """Returns the partition spec of a parameter with these logical axes."""
        entries: list[tuple[str, ...]] = []
        for axis in axes:
            used = [a for entry in entries for a in entry]
            entries.append(tuple(a for a in self._axes_in_mesh(RULES[axis]) if a not in used))
        return PartitionSpec(*(entry or None for entry in entries))

    def specs_of(self, value: Any, axes: Sequence[str]) -> Any:
        """Returns a parameter's partition spec; of a quantised one, a QuantizedArray of the specs of values and scale.

        Args:
          value: the whole parameter, or its shape.

        Raises:
          MeshError: an axis of the mesh would split a group of weights that share a scale, or a pair in one byte.
        """
        spec = self.spec(axes)
        if not isinstance(value, QuantizedArray):
            return spec
        scale_entries = (entry if n > 1 else None for entry, n in zip(spec, value.scale.shape, strict=True))
        scale_spec = PartitionSpec(*scale_entries)
        for part, part_spec in ((value.values, spec), (value.scale, scale_spec)):
            for dimension, (n, entry) in enumerate(zip(part.shape, part_spec, strict=True)):
                sizes = {axis: self.size(axis) for axis in axis_names_of(entry)}
                if n % math.prod(sizes.values()):
                    raise _indivisible_error(value, dimension, axes[dimension], sizes)
        return dataclasses.replace(value, values=spec, scale=scale_spec)

    def array_spec(self, *dimensions: str | tuple[str, ...] | None) -> PartitionSpec:
        """Returns the spec of an array whose dimensions are split over these axes, without axes of size 1."""
        return PartitionSpec(*(self._axes_in_mesh(axis_names_of(axes)) or None for axes in dimensions))

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Applies jax.shard_map over the mesh: every device runs the function on its shards of the arguments."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def abstract(self, shapes: Any, specs: Any) -> Any:
        """Adds shardings to shapes (a tree of ShapeDtypeStructs), for compiling ahead of time."""
        if self.mesh is None:
            return shapes

        def add_sharding(spec, tree):
            sharding = self.sharding(spec)
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)

        return jax.tree.map(add_sharding, specs, shapes)

    # Collectives.

    def _axes_in_mesh(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Returns those of the axes that have several devices."""
        return tuple(axis for axis in axes if self.size(axis) > 1)

    def axis_index(self, *axes: str) -> Array | int:
        """Returns this device's index along the axes, row-major."""
        names = self._axes_in_mesh(axes)
        return lax.axis_index(names) if names else 0

    def psum(self, x: Array, *axes: str) -> Array:
        names = self._axes_in_mesh(axes)
        return lax.psum(x, names) if names else x

    def pmax(self, x: Array, *axes: str) -> Array:
        names = self._axes_in_mesh(axes)
        return lax.pmax(x, names) if names else x

    def all_gather(self, x: Array, dimension: int, *axes: str) -> Array:
        """Concatenates the shards of all devices along the axes in a dimension."""
        names = self._axes_in_mesh(axes)
        return lax.all_gather(x, names, axis=dimension, tiled=True) if names else x

    def local_shard(self, x: Array, dimension: int, *axes: str) -> Array:
        """Returns this device's shard of an array that is replicated over the axes."""
        num_shards = self.size(*axes)
        if num_shards == 1:
            return x
        size = x.shape[dimension] // num_shards
        return lax.dynamic_slice_in_dim(x, self.axis_index(*axes) * size, size, axis=dimension)

    def gather_fsdp(self, parameter: Any) -> Any:
        """Gathers a parameter over `fsdp`, a quantised one as values and scale; other axes stay split."""
        value = parameter[...]
        for dimension, entry in enumerate(self.spec(parameter.get_metadata("axes"))):
            if "fsdp" not in axis_names_of(entry):
                continue
            if isinstance(value, QuantizedArray):
                scale = value.scale
                if value.scale_splits(dimension):
                    scale = self.all_gather(scale, dimension, "fsdp")
                value = dataclasses.replace(value, values=self.all_gather(value.values, dimension, "fsdp"), scale=scale)
            else:
                value = self.all_gather(value, dimension, "fsdp")
        return value

    # Tokens (B, T, …), replicated or split along T between layers.

    def gather_tokens(self, x: Array) -> Array:
        """All-gathers tokens over `expert` before a layer computes on them."""
        return self.all_gather(x, 1, "expert") if self.tokens_split else x

    def local_tokens(self, x: Array) -> Array:
        """Returns this device's tokens of an array with all tokens."""
        return self.local_shard(x, 1, "expert") if self.tokens_split else x

    def reduce_tokens(self, partial: Array) -> Array:
        """Reduces partial sums for all tokens over `expert` and `tensor`; returns this device's tokens."""
        if not self.tokens_split:
            return self.psum(partial, "expert", "tensor")
        return self.psum(self.scatter_sums(partial), "tensor")

    def scatter_sums(self, partial: Array) -> Array:
        """Reduces partial sums for all tokens over `expert`; returns this device's tokens, which must be split."""
        # Shards get a dimension of their own: along an inner one a TPU's compiler would all-reduce.
        B, T, *rest = partial.shape
        shards = partial.reshape(B, self.size("expert"), T // self.size("expert"), *rest).swapaxes(0, 1)
        return lax.psum_scatter(shards, "expert", scatter_dimension=0)

    def scatter_tokens(self, x: Array) -> Array:
        """All-to-all from a shard of the last dimension for all tokens to all of it for this device's tokens."""
        if not self.tokens_split:
            return self.all_gather(x, x.ndim - 1, "expert")
        return lax.all_to_all(x, "expert", split_axis=1, concat_axis=x.ndim - 1, tiled=True)

    def ragged_all_to_all(self, rows: Array, sizes: Array, buffer_size: int) -> Array:
        """Sends consecutive runs of rows (N, …) to each device along `expert`; returns the rows received.

        Args:
          sizes: (devices, devices), the number of rows that each device sends to each; the same everywhere.
          buffer_size: rows of the result (buffer_size, …), in the order of their senders, padded with zeros.
        """
        device = self.axis_index("expert")
        send_offsets = jnp.cumsum(sizes, axis=1) - sizes
        receive_offsets = jnp.cumsum(sizes, axis=0) - sizes
        if self.platform != "cpu":
            buffer = jnp.zeros((buffer_size, *rows.shape[1:]), rows.dtype)
            send, receive = (send_offsets[device], sizes[device]), (receive_offsets[device], sizes[:, device])
            return lax.ragged_all_to_all(rows, buffer, *send, *receive, axis_name="expert")
        # CPUs have no such operation: select from the rows of all devices.
        rows = lax.all_gather(rows, "expert")  # (devices, N, …)
        starts, ends = receive_offsets[:, device], receive_offsets[:, device] + sizes[:, device]
        index = jnp.arange(buffer_size)
        sender = jnp.sum(index[:, None] >= ends[None], axis=1)
        is_received, sender = sender < len(sizes), jnp.minimum(sender, len(sizes) - 1)
        source = jnp.where(is_received, send_offsets[:, device][sender] + index - starts[sender], 0)
        received = rows[sender, source]
        return jnp.where(is_received.reshape(-1, *[1] * (received.ndim - 1)), received, 0)


ONE_DEVICE = Partition()


def axis_names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def check_mesh(config: DbrxConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the model can be partitioned over the mesh.

    Raises:
      MeshError: an axis is unknown, or does not divide the dimension it splits; the message names sizes that do.
    """
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise MeshError(f"mesh: no axis is called {unknown[0]!r}: choose among {', '.join(AXES)}")
    partition = Partition(mesh)
    tensor, expert, fsdp = (partition.size(axis) for axis in ("tensor", "expert", "fsdp"))
    for axis, size, name in (
        ("tensor", tensor, "kv_n_heads"),
        ("tensor", tensor, "ffn_hidden_size"),
        ("expert", expert, "moe_num_experts"),
        ("expert", expert, "d_model"),
        ("expert times fsdp", expert * fsdp, "d_model"),
    ):
        value = getattr(config, name)
        if value % size:
            divisors = ", ".join(str(n) for n in range(1, min(value, 2 * size) + 1) if value % n == 0)
            raise MeshError(f"mesh: {axis}={size} does not divide {name} {value}; {divisors} would")


def _indivisible_error(value: QuantizedArray, dimension: int, axis: str, sizes: Mapping[str, int]) -> MeshError:
    """Returns the error that mesh axes do not divide a quantised dimension, with formats that they would divide."""
    n, size = value.shape[dimension], math.prod(sizes.values())
    axes = ",".join(f"{name}={count}" for name, count in sizes.items())
    groups = value.scale.shape[dimension]
    unit = f"its {groups} groups of {value.group}" if value.group and groups > 1 else "its pairs of int4"
    formats = []
    for group in GROUPS:
        with contextlib.suppress(QuantizationError):
            if group_count(n, group) % size == 0:
                formats.append(f"int4-{group}")
    if n % size == 0:
        formats.append("int8")
    return MeshError(f"mesh: {axes} does not divide {axis} {n} in {unit}; {', '.join(formats) or 'bfloat16'} would")


def check_all_to_all(mesh: Mesh | AbstractMesh) -> None:
    """Checks that the devices can run a ragged all-to-all.

    Raises:
      MeshError: the devices' network cannot.
    """
    if isinstance(mesh, Mesh) and "v5 lite" in mesh.devices.flat[0].device_kind:
        raise MeshError("all_to_all: the network of TPU v5e cannot; leave it out")


def parse_axes(text: str) -> dict[str, int]:
    """Parses sizes of mesh axes, such as "expert=16,tensor=4".

    Raises:
      MeshError: the text is not of that form, or an axis is unknown or named twice.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in AXES or axis in sizes or not (size.isdecimal() and len(size) < 8 and 0 < int(size) < 1 << 20):
            raise MeshError(f'mesh: expected a recipe or axes such as "expert=16,tensor=4", got {text!r:.80}')
        sizes[axis] = int(size)
    return sizes


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices (by default all) in a mesh of these sizes that follows their network.

    If the devices are in several slices (or GPUs in several hosts), `data`, else `fsdp`, spans them: the axes
    that communicate least.

    Raises:
      MeshError: the product of the sizes is not the number of devices, or no axis can span the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [axes.get(axis, 1) for axis in AXES]
    if math.prod(shape) != len(devices):
        text = ",".join(f"{axis}={size}" for axis, size in axes.items())
        raise MeshError(f"mesh: {text} makes {math.prod(shape)} devices, and there are {len(devices)}")
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        dimension = next((i for i in range(len(BATCH_AXES)) if shape[i] % slices == 0), None)
        if dimension is None:
            raise MeshError(f"mesh: data or fsdp must be a multiple of the {slices} slices, to go between them")
        shape[dimension] //= slices
        slices_shape = [slices if i == dimension else 1 for i in range(len(AXES))]
        grid = mesh_utils.create_hybrid_device_mesh(shape, slices_shape, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # devices of one host are equally near and have consecutive numbers
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES)
