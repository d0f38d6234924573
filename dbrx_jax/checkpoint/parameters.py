"""Names, shapes and partition specs of the model's parameters and arrays, read from the module tree."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.quantization import Format, Quantization, QuantizedArray
from dbrx_jax.quantization.array import abstract

AnyMesh = Mesh | AbstractMesh
Network = TypeVar("Network", bound=CausalLM)


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter: shape, logical axis of each dimension, and contracted dimensions (counted from the end)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    contracted: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def quantized(self, format: Format, dtype: Any) -> QuantizedArray:
        """Returns the shapes and dtypes of the quantised parameter, with scales in `dtype`.

        Raises:
          QuantizationError: the format does not fit the shape.
        """
        return abstract(self.shape, format, self.contracted, dtype)


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """One array of a model: its partition spec, and the parameters stacked in its first dimension.

    An array of one parameter has no such dimension; its vocabulary may be padded with zeros.

    Args:
      value: the ShapeDtypeStruct; if quantised, a QuantizedArray of two.
      spec: the PartitionSpec; if quantised, a QuantizedArray of two.
    """

    value: Any
    spec: Any
    parameters: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def leaves(self) -> list[tuple[str, jax.ShapeDtypeStruct, PartitionSpec]]:
        """Returns name, shape and partition spec of the stored arrays: "values" and "scale", or "" if unquantised."""
        if not isinstance(self.value, QuantizedArray):
            return [("", self.value, self.spec)]
        return [(part, getattr(self.value, part), getattr(self.spec, part)) for part in ("values", "scale")]

    def from_leaves(self, leaves: Mapping[str, Any]) -> Any:
        """Returns the array, or QuantizedArray, that consists of these leaves."""
        return dataclasses.replace(self.value, **leaves) if "values" in leaves else leaves[""]


@functools.lru_cache(maxsize=8)
def parameter_specs(config: DbrxConfig) -> Mapping[str, ParameterSpec]:
    """Returns every parameter by its dotted name, such as ``blocks.0.moe.experts.3.w1``, in the model's order."""
    specs: dict[str, ParameterSpec] = {}
    named_leaves = _leaves(nnx.state(CausalLM(config, rngs=None), nnx.Param))
    for num_stacked, group in itertools.groupby(named_leaves, lambda named_leaf: _num_stacked(named_leaf[1])):
        leaves = list(group)
        for e in range(num_stacked):  # expert by expert, also if one array stacks all experts of a layer
            for name, leaf in leaves:
                shape, axes, metadata = leaf.get_value().shape, leaf.get_metadata("axes"), leaf.get_metadata()
                if num_stacked > 1:
                    name, shape, axes = name.replace(".experts.0.", f".experts.{e}."), shape[1:], axes[1:]
                specs[name] = ParameterSpec(tuple(shape), axes, metadata.get("contracted", ()))
    return specs


def _num_stacked(leaf: Any) -> int:
    """Returns the number of parameters that are stacked in one array of a model."""
    return leaf.get_value().shape[0] if leaf.get_metadata("axes")[0] == "experts" else 1


@functools.lru_cache(maxsize=32)
def array_layouts(
    config: DbrxConfig, mesh: AnyMesh | None, quantization: Quantization | None = None, dtype: Any = None
) -> Mapping[str, ArrayLayout]:
    """Returns the arrays of a model on a mesh by their dotted names; without a mesh these are the parameters' names.

    Raises:
      MeshError, QuantizationError: as in :class:`CausalLM`.
    """
    model = CausalLM(config, rngs=None, dtype=dtype, mesh=mesh, quantization=quantization)
    num_experts, layouts = config.moe_num_experts, {}
    num_arrays, num_devices = model.partition.expert_arrays(num_experts), model.partition.size("expert")
    per_device = num_experts // num_devices
    per_array = per_device // num_arrays  # of one device's
    for name, leaf in _leaves(nnx.state(model, nnx.Param)):
        parameters = [name]
        if num_arrays < num_experts and ".experts." in name:
            block, _, rest = name.partition(".experts.")
            index, weight = rest.split(".")
            first = int(index) * per_array
            experts = [d * per_device + first + i for d in range(num_devices) for i in range(per_array)]
            parameters = [f"{block}.experts.{e}.{weight}" for e in experts]
        value = leaf.get_value()
        spec = model.partition.specs_of(value, leaf.get_metadata("axes"))
        layouts[name] = ArrayLayout(value, spec, tuple(parameters))
    return layouts


def model_from_arrays(
    network: type[Network], config: DbrxConfig, arrays: Mapping[str, Any], mesh: Mesh | None, **options: Any
) -> Network:
    """Makes a model from arrays by the names of :func:`array_layouts`; `options` are the network's."""
    dtype = next(iter(arrays.values())).dtype
    model = network(config, rngs=None, dtype=dtype, mesh=mesh, **options)
    graph, state = nnx.split(model)
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def model_from_parameters(
    network: type[Network],
    config: DbrxConfig,
    parameters: Mapping[str, Any],
    mesh: Mesh | None = None,
    quantization: Quantization | None = None,
    **options: Any,
) -> Network:
    """Makes a model from parameters by the names of :func:`parameter_specs`.

    Args:
      quantization: formats of the parameters that are QuantizedArrays.
      options: the network's, such as all_to_all.
    """
    arrays, dtype = {}, jnp.asarray(parameters["norm_f.scale"]).dtype
    for name, layout in array_layouts(config, mesh, quantization, dtype).items():
        leaves = {}
        for part, abstract_leaf, spec in layout.leaves():
            values = (parameters[p] for p in layout.parameters)
            stacked = [jnp.asarray(getattr(value, part) if part else value) for value in values]
            leaf = jnp.stack(stacked) if len(stacked) > 1 else stacked[0]
            padding = [(0, padded - n) for padded, n in zip(abstract_leaf.shape, leaf.shape, strict=True)]
            leaf = jnp.pad(leaf, padding) if any(n for _, n in padding) else leaf
            leaves[part] = jax.device_put(leaf, NamedSharding(mesh, spec)) if mesh else leaf
        arrays[name] = layout.from_leaves(leaves)
    return model_from_arrays(network, config, arrays, mesh, quantization=quantization, **options)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree of dictionaries from values by dotted names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a tree of dictionaries with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parameters_of(model: CausalLM) -> dict[str, Any]:
    """Returns a model's arrays or QuantizedArrays by the names of :func:`parameter_specs`, on any mesh."""
    return parameters_from_state(model.config, nnx.state(model, nnx.Param), model.partition.mesh)


def parameters_from_state(config: DbrxConfig, state: nnx.State, mesh: AnyMesh | None) -> dict[str, Any]:
    """Returns parameters by name from a state of the model, such as its gradients."""
    arrays = {name: leaf.get_value() for name, leaf in _leaves(state)}
    specs = parameter_specs(config)
    parameters: dict[str, Any] = {}
    for name, layout in array_layouts(config, mesh).items():
        if len(layout.parameters) > 1:
            parameters |= {parameter: arrays[name][i] for i, parameter in enumerate(layout.parameters)}
        elif arrays[name].shape != specs[name].shape:
            parameters[name] = arrays[name][: specs[name].shape[0]]
        else:
            parameters[name] = arrays[name]
    return {name: parameters[name] for name in specs}


def _leaves(state: nnx.State) -> Iterator[tuple[str, Any]]:
    for path, leaf in nnx.to_flat_state(state):
        yield ".".join(map(str, path)), leaf
