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


class Structure:
    """All of a model but its arrays. Two that are equal are one object, which jit compares at no cost."""

    def __init__(self, graph: nnx.GraphDef, tree: Any, platform: str):
        self.graph, self.tree, self.platform = graph, tree, platform


_structure = functools.lru_cache(maxsize=64)(Structure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model for jit: its arrays in a list, and all else."""

    arrays: list[Any]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def merge(self) -> CausalLM:
        return nnx.merge(self.structure.graph, self.state)

    @property
    def platform(self) -> str:
        """Of the devices."""
        return self.structure.platform

    @property
    def state(self) -> nnx.State:
        """The parameters in their tree."""
        return jax.tree.unflatten(self.structure.tree, self.arrays)

    def places(self) -> "SplitModel":
        """Where each array lies on the model's mesh."""
        specs = parameter_places(self.state, self.merge().partition)
        return SplitModel(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)), self.structure)


def split(model: CausalLM) -> SplitModel:
    """The model as jit takes it, without what the checkpoint says of the end of a text, which changes no program."""
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig()
    graph, state = nnx.split(bare)
    arrays, tree = jax.tree.flatten(state)
    return SplitModel(arrays, _structure(graph, tree, model.partition.platform))


def parameter_places(state: nnx.State, partition: Partition) -> nnx.State:
    """Where each parameter lies on the mesh, in the tree of the parameters."""
    flat = [(path, leaf.replace(_places(leaf, partition))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def _places(leaf: Any, partition: Partition) -> Any:
    return partition.places(leaf.get_value(), leaf.get_metadata("axes"))
