"""The model's parameters by name, read off the module tree: one description that all else follows."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.causal_lm import DbrxForCausalLM


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its shape and, for each dimension, the name of its logical axis."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def abstract_model(config: DbrxConfig, dtype: Any = None) -> DbrxForCausalLM:
    """A model whose parameters are shapes without memory behind them."""
    return DbrxForCausalLM(config, rngs=None, dtype=dtype)


@functools.lru_cache(maxsize=8)
def parameter_specs(config: DbrxConfig) -> Mapping[str, ParameterSpec]:
    """Every parameter by its dotted name, such as ``blocks.0.moe.experts.3.w1``, in the model's order."""
    state = nnx.state(abstract_model(config), nnx.Param)
    return {
        ".".join(map(str, path)): ParameterSpec(tuple(leaf.get_value().shape), leaf.get_metadata("axes"))
        for path, leaf in nnx.to_flat_state(state)
    }


def model_from_parameters(config: DbrxConfig, parameters: Mapping[str, jax.Array]) -> DbrxForCausalLM:
    """The model with these arrays, given under the names of :func:`parameter_specs`, as its parameters."""
    graph, state = nnx.split(abstract_model(config, next(iter(parameters.values())).dtype))
    flat = [(path, leaf.replace(parameters[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


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


def parameters_of(model: DbrxForCausalLM) -> dict[str, jax.Array]:
    """The model's arrays by dotted name."""
    state = nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): jnp.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
