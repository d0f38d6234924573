"""Partition: mesh axes, partition specs and collectives of a model that runs under jax.shard_map.

The only module that names mesh axes. Without a mesh every function here does nothing, so the same code runs on one
device. Batch rows are split over `data` and `fsdp`; weights over `fsdp` too, gathered when used; experts over
`expert`; inner dimensions over `tensor`; positions of the key-value cache over `expert`, round-robin.
"""

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
BATCH_AXES = ("data", "fsdp")  # of a batch
GPU = ("gpu", "cuda")  # what JAX calls the platform
VOCAB_AXES = ("expert", "tensor")
CONTEXT_AXIS = "expert"  # position p of the cache is on device p modulo the axis' size

# Logical axis of a parameter -> mesh axes. Each takes what an earlier dimension of the parameter left.
RULES: Mapping[str, tuple[str, ...]] = {
    "vocab": VOCAB_AXES,
    "experts": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "embed": ("expert", "fsdp"),
    "head_dim": (),
    "replicated": (),  # norms and routers: small, and needed whole everywhere
}
# Vocabulary entries that share one draw of random numbers; a device holds a multiple of it.
VOCAB_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model's partitioning over a mesh. Collectives are called inside :meth:`shard_map`.

    Args:
      mesh: with axes among AXES; None is one device.
      tokens_split: whether the tokens between two layers are split over `expert` too, along dimension 1 (the
        ring: all-gather, compute, reduce-scatter), or are replicated over it (decode).
      all_to_all: whether split tokens go to their experts' devices alone, rather than round the ring.
      attention: which implementation of attention is used, a name of :mod:`dbrx_jax.ops.attention`'s; None is
        the platform's best.
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
        """Devices along these axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    def expert_arrays(self, experts: int) -> int:
        """Number of arrays that hold the experts of a layer, each with equally many of every device.

        Kernels pick among those in one array. XLA would copy what is picked: it reads each from a buffer of its own.
        """
        return 1 if kernel_backend(self.platform) else experts // self.size("expert")

    def with_tokens_split(self, tokens: int) -> "Partition":
        """A partition with tokens split over `expert`, if that axis divides them."""
        experts = self.size("expert")
        return dataclasses.replace(self, tokens_split=experts > 1 and tokens % experts == 0)

    def pad_vocabulary(self, entries: int) -> int:
        """The padded vocabulary size: on a mesh, a multiple that splits evenly over the devices."""
        if self.mesh is None:
            return entries
        unit = self.size(*VOCAB_AXES) * VOCAB_BLOCK
        return -(-entries // unit) * unit

    # Partition specs.

    def spec(self, axes: Sequence[str]) -> PartitionSpec:
        """Partition spec of a parameter, from its logical axes."""
        taken: set[str] = set()
        dimensions = []
        for axis in axes:
            mine = [a for a in RULES[axis] if self.size(a) > 1 and a not in taken]
            taken.update(mine)
            dimensions.append(tuple(mine) or None)
        return PartitionSpec(*dimensions)

    def specs_of(self, value: Any, axes: Sequence[str]) -> Any:
        """A parameter's specification; of a quantised one, a QuantizedArray of those of its values and scale.

        Args:
          value: the whole parameter, or its shape.

        Raises:
          MeshError: an axis of the mesh would cut a group of weights that share a scale, or a pair in one byte.
        """
        spec = self.spec(axes)
        if not isinstance(value, QuantizedArray):
            return spec
        scale = [entry if n > 1 else None for entry, n in zip(spec, value.scale.shape, strict=True)]
        for part, entries in ((value.values, spec), (value.scale, scale)):
            for dimension, (n, entry) in enumerate(zip(part.shape, entries, strict=True)):
                if n % self.size(*axis_names_of(entry)):
                    raise _cut(value, dimension, axes[dimension], {a: self.size(a) for a in axis_names_of(entry)})
        return dataclasses.replace(value, values=spec, scale=PartitionSpec(*scale))

    def array_spec(self, *dimensions: str | tuple[str, ...] | None) -> PartitionSpec:
        """Partition spec of an array whose dimensions are split over these axes; axes of size 1 are left out."""
        names = [(d,) if isinstance(d, str) else d or () for d in dimensions]
        return PartitionSpec(*(tuple(a for a in axes if self.size(a) > 1) or None for axes in names))

    def sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def shardings(self, places: Any) -> Any:
        """Shardings of a tree of partition specs, such as :meth:`specs_of` returns."""
        if self.mesh is None:
            return None
        return jax.tree.map(self.sharding, places, is_leaf=lambda s: isinstance(s, PartitionSpec))

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """jax.shard_map over the mesh: every device runs the function on its shards of the arguments."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def abstract(self, shapes: Any, specs: Any) -> Any:
        """Shapes (a tree of ShapeDtypeStructs) with shardings, for compiling ahead of time."""
        if self.mesh is None:
            return shapes

        def one(spec, tree):
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)

        return jax.tree.map(one, specs, shapes, is_leaf=lambda s: isinstance(s, PartitionSpec))

    # Collectives.

    def _axes_in_mesh(self, axes: Sequence[str]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.size(axis) > 1)

    def axis_index(self, *axes: str) -> Array | int:
        """This device's index along the axes, row-major."""
        real = self._axes_in_mesh(axes)
        return lax.axis_index(real) if real else 0

    def psum(self, x: Array, *axes: str) -> Array:
        real = self._axes_in_mesh(axes)
        return lax.psum(x, real) if real else x

    def pmax(self, x: Array, *axes: str) -> Array:
        real = self._axes_in_mesh(axes)
        return lax.pmax(x, real) if real else x

    def all_gather(self, x: Array, dimension: int, *axes: str) -> Array:
        """Concatenates the shards of all devices along the axes in a dimension."""
        real = self._axes_in_mesh(axes)
        return lax.all_gather(x, real, axis=dimension, tiled=True) if real else x

    def local_shard(self, x: Array, dimension: int, *axes: str) -> Array:
        """This device's shard of an array that is replicated over the axes."""
        count = self.size(*axes)
        if count == 1:
            return x
        part = x.shape[dimension] // count
        return lax.dynamic_slice_in_dim(x, self.axis_index(*axes) * part, part, axis=dimension)

    def gather_fsdp(self, parameter: Any) -> Any:
        """Gathers a parameter over `fsdp`; other axes stay split.

        A quantised one stays so: its values and scales are gathered.
        """
        value = parameter[...]
        for dimension, axes in enumerate(self.spec(parameter.get_metadata("axes"))):
            if not axes or "fsdp" not in axes:
                continue
            if isinstance(value, QuantizedArray):
                scale = (
                    self.all_gather(value.scale, dimension, "fsdp") if value.scale_splits(dimension) else value.scale
                )
                values = self.all_gather(value.values, dimension, "fsdp")
                value = dataclasses.replace(value, values=values, scale=scale)
            else:
                value = self.all_gather(value, dimension, "fsdp")
        return value

    # Tokens (B, T, …), replicated or split along T between layers.

    def gather_tokens(self, x: Array) -> Array:
        """All-gathers tokens over `expert` before a layer computes on them."""
        return self.all_gather(x, 1, "expert") if self.tokens_split else x

    def local_tokens(self, x: Array) -> Array:
        """This device's tokens of an array with all tokens."""
        return self.local_shard(x, 1, "expert") if self.tokens_split else x

    def reduce_tokens(self, partial: Array) -> Array:
        """Reduces partial sums for all tokens over `expert` and `tensor`; returns this device's tokens."""
        if self.tokens_split:
            # Parts as a dimension of their own: along an inner one a TPU's compiler sums all for all.
            B, T, *rest = partial.shape
            parts = partial.reshape(B, self.size("expert"), T // self.size("expert"), *rest).swapaxes(0, 1)
            return self.psum(lax.psum_scatter(parts, "expert", scatter_dimension=0), "tensor")
        return self.psum(partial, "expert", "tensor")

    def scatter_tokens(self, x: Array) -> Array:
        """All-to-all from a shard of the last dimension for all tokens to all of it for this device's tokens."""
        if not self.tokens_split:
            return self.all_gather(x, x.ndim - 1, "expert")
        return lax.all_to_all(x, "expert", split_axis=1, concat_axis=x.ndim - 1, tiled=True)

    def ragged_all_to_all(self, rows: Array, sizes: Array, buffer_size: int) -> Array:
        """Ragged all-to-all along `expert`: sends runs of rows (N, …) to each device; returns the rows received.

        Args:
          sizes: (devices, devices), how many rows each device sends to each; the same everywhere.
          buffer_size: rows of the result (buffer_size, …), in the order of their senders, padded with zeros.
        """
        me = self.axis_index("expert")
        begins = jnp.cumsum(sizes, axis=1) - sizes  # of each run where it is sent from
        places = jnp.cumsum(sizes, axis=0) - sizes  # and where it arrives
        if self.platform == "cpu":  # which has no such operation
            return self._ragged_all_to_all_on_cpu(
                lax.all_gather(rows, "expert"), begins[:, me], places[:, me], sizes[:, me], buffer_size
            )
        arriving = jnp.zeros((buffer_size, *rows.shape[1:]), rows.dtype)
        return lax.ragged_all_to_all(
            rows, arriving, begins[me], sizes[me], places[me], sizes[:, me], axis_name="expert"
        )

    def _ragged_all_to_all_on_cpu(
        self, rows: Array, begins: Array, places: Array, sizes: Array, buffer_size: int
    ) -> Array:
        """Selects the received rows from those of all devices (devices, N, …)."""
        place = jnp.arange(buffer_size)
        sender = jnp.sum(place[:, None] >= (places + sizes)[None], axis=1)
        real, sender = sender < len(sizes), jnp.minimum(sender, len(sizes) - 1)
        picked = rows[sender, jnp.where(real, begins[sender] + place - places[sender], 0)]
        return jnp.where(real.reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)


ONE_DEVICE = Partition()


def axis_names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def check_mesh(config: DbrxConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the model can be partitioned over the mesh.

    Raises:
      MeshError: an axis is unknown, or does not divide what it splits; the message says what would fit.
    """
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise MeshError(f"mesh: no axis is called {unknown[0]!r}: choose among {', '.join(AXES)}")
    partition = Partition(mesh)
    tensor, experts, fsdp = (partition.size(axis) for axis in ("tensor", "expert", "fsdp"))
    for axis, size, name in (
        ("tensor", tensor, "kv_n_heads"),
        ("tensor", tensor, "ffn_hidden_size"),
        ("expert", experts, "moe_num_experts"),
        ("expert", experts, "d_model"),
        ("expert times fsdp", experts * fsdp, "d_model"),
    ):
        value = getattr(config, name)
        if value % size:
            fitting = ", ".join(str(n) for n in range(1, min(value, 2 * size) + 1) if value % n == 0)
            raise MeshError(f"mesh: {axis}={size} does not divide {name} {value}; {fitting} would")


def _cut(value: QuantizedArray, dimension: int, axis: str, sizes: Mapping[str, int]) -> MeshError:
    """The error that mesh axes do not divide a dimension of a quantised parameter, with formats they would divide."""
    n, size = value.shape[dimension], math.prod(sizes.values())
    names = ",".join(f"{name}={count}" for name, count in sizes.items())
    groups = value.scale.shape[dimension]
    what = f"its {groups} groups of {value.group}" if value.group and groups > 1 else "its pairs of int4"
    fitting = []
    for group in GROUPS:
        try:
            if group_count(n, group) % size == 0:
                fitting.append(f"int4-{group}")
        except QuantizationError:
            continue
    if n % size == 0:
        fitting.append("int8")
    return MeshError(f"mesh: {names} does not divide {axis} {n} in {what}; {', '.join(fitting) or 'bfloat16'} would")


def check_all_to_all(mesh: Mesh | AbstractMesh) -> None:
    """Checks that the devices can run a ragged all-to-all.

    Raises:
      MeshError: the devices' network cannot.
    """
    if isinstance(mesh, Mesh) and "v5 lite" in mesh.devices.flat[0].device_kind:
        raise MeshError("all_to_all: the network of TPU v5e cannot; leave it out")


def parse_axes(text: str) -> dict[str, int]:
    """Sizes of mesh axes from a text such as "expert=16,tensor=4".

    Raises:
      MeshError: it is not of that form, or an axis is unknown or named twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or not 0 < int(size) < 1 << 20:
            raise MeshError(f'mesh: expected a recipe or axes such as "expert=16,tensor=4", got {text!r:.80}')
        sizes[axis] = int(size)
    return sizes


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over the devices (all there are by default), laid out along their network.

    If the devices are in several slices (or GPUs in several hosts), `data`, else `fsdp`, goes between
    them: the axes that communicate least.

    Raises:
      MeshError: the sizes do not make up the number of devices, or no axis fits the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [axes.get(axis, 1) for axis in AXES]
    if math.prod(shape) != len(devices):
        text = ",".join(f"{axis}={size}" for axis, size in axes.items())
        raise MeshError(f"mesh: {text} makes {math.prod(shape)} devices, and there are {len(devices)}")
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        between = [1, 1, 1, 1]
        place = next((i for i in range(len(BATCH_AXES)) if shape[i] % slices == 0), None)
        if place is None:
            raise MeshError(f"mesh: data or fsdp must be a multiple of the {slices} slices, to go between them")
        between[place] = slices
        shape[place] //= slices
        grid = mesh_utils.create_hybrid_device_mesh(shape, between, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # all of a host are equally near, hosts come one after another
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES)
