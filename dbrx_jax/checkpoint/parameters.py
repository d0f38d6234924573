"""The model's parameters by name, and their arrays on a mesh, both read from the module tree."""

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
    """One parameter: its shape, each dimension's logical axis, and those that are summed over, from the end."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    contracted: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def quantized(self, form: Format, dtype: Any) -> QuantizedArray:
        """The quantised parameter, as shapes.

        Raises:
          QuantizationError: it cannot be.
        """
        return abstract(self.shape, form, self.contracted, dtype)


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """Layout of one array of a model: its partition spec, and the parameters stacked in its first dimension.

    With one parameter it is that one, with zeros as padding of the vocabulary.

    Args:
      value: its shape and dtype; of a quantised one, a QuantizedArray of them.
      spec: its PartitionSpec; of a quantised one, a QuantizedArray of them.
    """

    value: Any
    spec: Any
    parameters: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def leaves(self) -> list[tuple[str, jax.ShapeDtypeStruct, PartitionSpec]]:
        """The arrays that it is made of: their names in a QuantizedArray ("" where it is none), shapes and places."""
        if not isinstance(self.value, QuantizedArray):
            return [("", self.value, self.spec)]
        return [(part, getattr(self.value, part), getattr(self.spec, part)) for part in ("values", "scale")]


@functools.lru_cache(maxsize=8)
def parameter_specs(config: DbrxConfig) -> Mapping[str, ParameterSpec]:
    """Every parameter by its dotted name, such as ``blocks.0.moe.experts.3.w1``, in the model's order."""
    specs: dict[str, ParameterSpec] = {}
    for together, group in itertools.groupby(_leaves(CausalLM(config, rngs=None)), lambda leaf: _experts_in(leaf[1])):
        leaves = list(group)
        for e in range(together):  # in this order also if all of a layer are in one array
            for name, leaf in leaves:
                shape, axes, about = leaf.get_value().shape, leaf.get_metadata("axes"), leaf.get_metadata()
                if together > 1:
                    name, shape, axes = name.replace(".experts.0.", f".experts.{e}."), shape[1:], axes[1:]
                specs[name] = ParameterSpec(tuple(shape), axes, about.get("contracted", ()))
    return specs


def _experts_in(leaf: Any) -> int:
    """Number of parameters in one array of a model."""
    return leaf.get_value().shape[0] if leaf.get_metadata("axes")[0] == "experts" else 1


@functools.lru_cache(maxsize=32)
def array_layouts(
    config: DbrxConfig, mesh: AnyMesh | None, quantization: Quantization | None = None, dtype: Any = None
) -> Mapping[str, ArrayLayout]:
    """The arrays of a model on a mesh by their dotted names in it, which are the parameters' where there is no mesh.

    Raises:
      MeshError, QuantizationError: as in :class:`CausalLM`.
    """
    model = CausalLM(config, rngs=None, dtype=dtype, mesh=mesh, quantization=quantization)
    experts, result = config.moe_num_experts, {}
    arrays, devices = model.partition.expert_arrays(experts), model.partition.size("expert")
    each, together = experts // devices, experts // devices // arrays  # of a device; of those in one array
    for name, leaf in _leaves(model):
        parameters = [name]
        if arrays < experts and ".experts." in name:
            block, _, rest = name.partition(".experts.")
            place, weight = rest.split(".")
            numbers = [x * each + int(place) * together + i for x in range(devices) for i in range(together)]
            parameters = [f"{block}.experts.{e}.{weight}" for e in numbers]
        value = leaf.get_value()
        spec = model.partition.specs_of(value, leaf.get_metadata("axes"))
        result[name] = ArrayLayout(value, spec, tuple(parameters))
    return result


def model_from_arrays(
    network: type[Network], config: DbrxConfig, arrays: Mapping[str, Any], mesh: Mesh | None, **options: Any
) -> Network:
    """Makes a model of arrays given under the names of :func:`array_layouts`; `options` are the network's."""
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
    """Makes a model of parameters given under the names of :func:`parameter_specs`.

    Args:
      quantization: the parts whose parameters are QuantizedArrays, and their formats.
      options: the network's, such as all_to_all.
    """
    arrays, dtype = {}, jnp.asarray(parameters["norm_f.scale"]).dtype
    for name, placed in array_layouts(config, mesh, quantization, dtype).items():
        found = {}
        for part, shape, spec in placed.leaves():
            given = (parameters[p] for p in placed.parameters)
            parts = [jnp.asarray(getattr(g, part) if part else g) for g in given]
            array = jnp.stack(parts) if len(parts) > 1 else parts[0]
            missing = [(0, want - have) for want, have in zip(shape.shape, array.shape, strict=True)]
            array = jnp.pad(array, missing) if any(m for _, m in missing) else array
            found[part] = jax.device_put(array, NamedSharding(mesh, spec)) if mesh else array
        arrays[name] = dataclasses.replace(placed.value, **found) if "values" in found else found[""]
    return model_from_arrays(network, config, arrays, mesh, quantization=quantization, **options)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of plain dictionaries from dotted names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of dictionaries with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parameters_of(model: CausalLM) -> dict[str, Any]:
    """The model's parameters under the names of :func:`parameter_specs`, on any mesh.

    Arrays, or QuantizedArrays where the model is quantised.
    """
    return parameters_from_state(model.config, nnx.state(model, nnx.Param), model.partition.mesh)


def parameters_from_state(config: DbrxConfig, state: nnx.State, mesh: AnyMesh | None) -> dict[str, Any]:
    """Parameters by name from a state of the model, such as its gradients."""
    arrays = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    specs = parameter_specs(config)
    found: dict[str, Any] = {}
    for name, placed in array_layouts(config, mesh).items():
        if len(placed.parameters) > 1:
            found |= {parameter: arrays[name][x] for x, parameter in enumerate(placed.parameters)}
        elif arrays[name].shape != specs[name].shape:
            found[name] = arrays[name][: specs[name].shape[0]]
        else:
            found[name] = arrays[name]
    return {name: found[name] for name in specs}


def _leaves(model: CausalLM) -> Iterator[tuple[str, Any]]:
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield ".".join(map(str, path)), leaf
