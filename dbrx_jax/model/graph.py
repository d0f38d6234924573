"""ModelState: a model as jit takes it, split into its graph definition and its arrays."""

import copy
import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.sharding.partition import Partition


class GraphDefinition:
    """A model without its arrays. Equal ones are one object, which jit compares at no cost."""

    def __init__(self, graph: nnx.GraphDef, tree: Any, platform: str):
        self.graph, self.tree, self.platform = graph, tree, platform


_cached_definition = functools.lru_cache(maxsize=64)(GraphDefinition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """A model for jit: its arrays, and the rest as a static field."""

    arrays: list[Any]
    definition: GraphDefinition = dataclasses.field(metadata={"static": True})

    def merge(self) -> CausalLM:
        return nnx.merge(self.definition.graph, self.state)

    @property
    def platform(self) -> str:
        """The platform of the devices."""
        return self.definition.platform

    @property
    def state(self) -> nnx.State:
        """The parameters in their tree."""
        return jax.tree.unflatten(self.definition.tree, self.arrays)

    def specs(self) -> "ModelState":
        """Returns the partition specs of the arrays, in the same structure."""
        specs = parameter_partition_specs(self.state, self.merge().partition)
        return ModelState(jax.tree.leaves(specs), self.definition)


def split_model(model: CausalLM) -> ModelState:
    """Splits a model, without what no program has to be compiled anew for: its generation_config and path."""
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig()
    bare.checkpoint_path = None
    graph, state = nnx.split(bare)
    arrays, tree = jax.tree.flatten(state)
    return ModelState(arrays, _cached_definition(graph, tree, model.partition.platform))


def parameter_partition_specs(state: nnx.State, partition: Partition) -> nnx.State:
    """Returns the partition specs of the parameters, in the tree of the state."""
    specs = []
    for path, leaf in nnx.to_flat_state(state):
        spec = partition.specs_of(leaf.get_value(), leaf.get_metadata("axes"))
        specs.append((path, leaf.replace(spec)))
    return nnx.from_flat_state(specs)
