"""A model split into its graph definition and its arrays, as jit takes it."""

import copy
import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.sharding.partition import Partition


class GraphDefinition:
    """All of a model but its arrays. Two that are equal are one object, which jit compares at no cost."""

    def __init__(self, graph: nnx.GraphDef, tree: Any, platform: str):
        self.graph, self.tree, self.platform = graph, tree, platform


_structure = functools.lru_cache(maxsize=64)(GraphDefinition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """A model for jit: its arrays in a list, and all else."""

    arrays: list[Any]
    structure: GraphDefinition = dataclasses.field(metadata={"static": True})

    def merge(self) -> CausalLM:
        return nnx.merge(self.structure.graph, self.state)

    @property
    def platform(self) -> str:
        """The platform of the devices."""
        return self.structure.platform

    @property
    def state(self) -> nnx.State:
        """The parameters in their tree."""
        return jax.tree.unflatten(self.structure.tree, self.arrays)

    def specs(self) -> "ModelState":
        """Partition specs of the arrays, in the same structure."""
        specs = parameter_partition_specs(self.state, self.merge().partition)
        return ModelState(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)), self.structure)


def split_model(model: CausalLM) -> ModelState:
    """The model as jit takes it, without what the checkpoint says of the end of a text, which changes no program."""
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig()
    graph, state = nnx.split(bare)
    arrays, tree = jax.tree.flatten(state)
    return ModelState(arrays, _structure(graph, tree, model.partition.platform))


def parameter_partition_specs(state: nnx.State, partition: Partition) -> nnx.State:
    """Partition specs of the parameters, in the tree of the state."""
    flat = [(path, leaf.replace(_spec(leaf, partition))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def _spec(leaf: Any, partition: Partition) -> Any:
    return partition.specs_of(leaf.get_value(), leaf.get_metadata("axes"))
