"""DbrxForCausalLM: the whole model, and the two ways through it (a full sequence, or new tokens and a cache)."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.cache import Cache
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.decoder import Block, Norm, traced_once
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.attention import chosen
from dbrx_jax.ops.linear import Weight, dequantized, linear
from dbrx_jax.ops.routing import Routing
from dbrx_jax.ops.tiles import over_tiles, tile_count
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding import ROWS, VOCABULARY, Partition, check_all_to_all, check_mesh


class CausalLMOutput(NamedTuple):
    """What :meth:`DbrxForCausalLM.__call__` returns when asked for more than logits."""

    logits: Float[Array, "B T V"]
    hidden_states: list[Float[Array, "B T D"]] | None  # embeddings, then after each block; the last is after norm_f
    router_probs: list[Float[Array, "B T E"]] | None  # float32, per layer, over all experts


class DbrxForCausalLM(nnx.Module):
    """DBRX with its language-model head.

    Args:
      config: the sizes.
      rngs: source of the initial weights (stream "params"); None gives parameters that are shapes only.
      dtype: of weights and activations; the configuration's by default.
      mesh: the devices that it lies on, see :mod:`dbrx_jax.sharding`; None is one device.
      all_to_all: as in :meth:`from_pretrained`.
      quantization: how weights are quantised, see :mod:`dbrx_jax.quantization`; None leaves them as they are.
      attention_implementation: as in :meth:`from_pretrained`.

    Raises:
      ConfigError: there is no such implementation of attention, or none for the devices.
      MeshError: the mesh does not fit the configuration, or the quantisation.
      QuantizationError: the quantisation does not fit the configuration.
    """

    def __init__(
        self,
        config: DbrxConfig,
        *,
        rngs: nnx.Rngs | None,
        dtype: DTypeLike | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        all_to_all: bool = False,
        quantization: Quantization | None = None,
        attention_implementation: str | None = None,
    ):
        if mesh is not None:
            check_mesh(config, mesh)
            if all_to_all:
                check_all_to_all(mesh)
        self.partition = Partition(mesh, all_to_all=all_to_all, attention=attention_implementation)
        chosen(attention_implementation, self.partition.platform)  # or raises
        dtype = config.dtype if dtype is None else dtype
        init = Init(None if rngs is None else rngs.params(), dtype, self.partition, quantization)
        V, D, std = self.partition.pad_vocabulary(config.vocab_size), config.d_model, config.initializer_range
        self.embedding = init.normal((V, D), ("vocab", "embed"), std, "embedding")
        self.blocks = nnx.List([Block(config, init) for _ in range(config.n_layers)])
        self.norm_f = Norm(config, init)
        self.lm_head = init.normal((V, D), ("vocab", "embed"), std, "head")
        self.config = config
        self.quantization = quantization
        self.generation_config = GenerationConfig()

    @staticmethod
    def from_pretrained(
        path: str | Path,
        mesh: Mesh | str | None = None,
        *,
        dtype: DTypeLike | None = None,
        quantization: str | Quantization | None = None,
        all_to_all: bool = False,
        attention_implementation: str | None = None,
    ) -> "DbrxForCausalLM":
        """Loads an Orbax checkpoint that dbrx-convert wrote, or a Hugging Face folder of safetensors.

        Every shard is read straight to its device.

        Args:
          path: a local folder, a URL such as gs://bucket/folder (extra [gcs]), or `hf://owner/name` on the
            Hugging Face hub (extra [hub]).
          mesh: the devices to lay it over: a jax Mesh, the name of a recipe such as "v5e-64", or axes such
            as "expert=16,tensor=4" over all devices; None is one device.
          dtype: to cast the weights to; None keeps what the checkpoint holds. Of quantised weights, that of their
            scales and of the activations: bfloat16 or float32.
          quantization: quantises the weights while they are read: "int8", "int4" (experts in groups of 128, the
            rest int8; also "int4-32", "int4-64"), "fp8", or parts such as "experts=int4-64,attention=int8". None
            keeps what the checkpoint holds.
          all_to_all: in prompts and training, send tokens to their experts' devices alone rather than
            round the ring (`jax.lax.ragged_all_to_all`, on TPU and GPU; a CPU gathers all and picks).
          attention_implementation: "flash", kernels for TPU and GPU; "xla", blocks in plain XLA; "reference", the
            definition with all scores at once, for tests. None is "flash" where there are kernels, else "xla".

        Raises:
          CheckpointError: the folder is not a complete checkpoint of a DBRX; the message says what is wrong.
          ConfigError: its config.json is missing or has a value that cannot be used, or there is no such
            implementation of attention, or none for the devices.
          MeshError: the mesh does not fit the model or the devices.
          QuantizationError: the quantisation is not known, or does not fit the model.
        """
        from dbrx_jax.checkpoint import load_model

        return load_model(path, mesh, dtype, quantization, all_to_all, attention_implementation)

    @property
    def dtype(self) -> np.dtype:
        """Of the weights and activations."""
        return self.embedding.get_value().dtype

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        position_ids: Int[ArrayLike, "B T"] | None = None,
        output_hidden_states: bool = False,
        output_router_probs: bool = False,
    ) -> Float[Array, "B T V"] | CausalLMOutput:
        """Logits (B, T, V) in float32 of every position.

        Args:
          input_ids: token ids.
          attention_mask: 1 for tokens, 0 for padding, which may lie left or right; logits there mean nothing.
          position_ids: by default the number of tokens before, padding not counted.
          output_hidden_states: return a :class:`CausalLMOutput` with them.
          output_router_probs: return a :class:`CausalLMOutput` with them.

        Raises:
          GenerationError: the arrays' shapes do not fit each other, or an id lies outside the vocabulary.
        """
        ids = check_ids(input_ids, self.config.vocab_size)
        mask = (
            np.ones(ids.shape, bool)
            if attention_mask is None
            else _same_shape("attention_mask", attention_mask, ids) != 0
        )
        if position_ids is None:
            positions = (
                np.maximum(np.cumsum(np.asarray(mask), axis=1) - 1, 0)
                if isinstance(mask, np.ndarray)
                else (jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0))
            )
        else:
            positions = _same_shape("position_ids", position_ids, ids)
        B, T = ids.shape
        wide = ((0, -B % self.partition.size(*ROWS)), (0, -T % self.partition.size("expert")))
        ids, mask, positions = (
            a if wide == ((0, 0), (0, 0)) else (np if isinstance(a, np.ndarray) else jnp).pad(a, wide)
            for a in (ids, mask, positions)
        )
        out = _forward(split(self), ids, mask, positions, output_hidden_states, output_router_probs)
        if self.partition.mesh is not None:
            out = out._replace(
                logits=out.logits[:B, :T, : self.config.vocab_size],
                hidden_states=[x[:B, :T] for x in out.hidden_states or ()] or None,
                router_probs=[x[:B, :T] for x in out.router_probs or ()] or None,
            )
        return out if output_hidden_states or output_router_probs else out.logits

    def generate(
        self, input_ids: Int[ArrayLike, "B T"], attention_mask: Int[ArrayLike, "B T"] | None = None, **options: Any
    ) -> Any:
        """Continues each row; see :func:`dbrx_jax.generation.generate` for the options."""
        from dbrx_jax.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        jitter_key: Array | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], list[Routing]]:
        """Hidden states (embeddings, then after each block; the last is after norm_f) and each layer's routing.

        On a mesh, this is what each device runs, on its rows; of the states it has its own tokens.

        Args:
          mask: False for padding.
          jitter_key: in training, the random key of the router's jitter.
        """
        partition = self.partition.with_split(input_ids.shape[1])

        states, routings = [self.embed(input_ids, partition)], []
        for i, block in enumerate(self.blocks):
            key = None if jitter_key is None else jax.random.fold_in(jitter_key, i)
            with jax.named_scope(f"block_{i}"):
                x, routing = traced_once(Block.sequence, block, partition, states[-1], positions, mask, key)
            states.append(x)
            routings.append(routing)
        states[-1] = self.norm_f(states[-1])
        return states, routings

    def extend(
        self,
        input_ids: Int[Array, "R T"],
        valid: Bool[Array, "R T"],
        positions: Int[Array, "R T"],
        cache: Cache,
        first_row: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R T D"], Cache]:
        """New tokens at `positions` of rows first_row … first_row + R: hidden states before norm_f, and the cache.

        Args:
          first_row: None is 0.
          valid: False for tokens that only fill the shape; they change nothing that is ever looked at.

        On a mesh, this is what each device runs, on its rows; the states are of all their tokens.
        """
        T = input_ids.shape[1]
        partition = self.partition.with_split(T)
        # Of several groups of rows, some may have nothing to do where others have a prompt's chunk.
        active = jnp.any(valid) if T > 1 and partition.size(*ROWS) > 1 else None
        x, layers = self.embed(input_ids, partition), []
        for i, (block, layer) in enumerate(zip(self.blocks, cache, strict=True)):
            with jax.named_scope(f"block_{i}"):
                new = x, valid, positions, layer, first_row, active
                x, layer = traced_once(Block.extend, block, partition, *new)
            layers.append(layer)
        return partition.all_tokens(x), layers

    def extend_tiles(
        self, input_ids: Int[Array, "R"], valid: Bool[Array, "R"], positions: Int[Array, "R"], cache: Cache
    ) -> tuple[Float[Array, "R D"], Cache]:
        """One new token of each row as :meth:`extend`, in products of TILE rows: no bit of a row depends on R.

        R is a multiple of TILE. Rows go through attention and router tile by tile, and to the experts together.
        """
        partition, count = self.partition, tile_count(input_ids.shape[0], positions)
        # In a loop of its own, or a product with a scale is joined with a later sum for some numbers of rows.
        x, _ = over_tiles(lambda _, ids, none: (self.embed(ids[:, None], partition), none), input_ids, None, count)
        layers = []
        for i, (block, layer) in enumerate(zip(self.blocks, cache, strict=True)):
            with jax.named_scope(f"block_{i}"):
                new = x, valid, positions, layer, count
                x, layer = traced_once(Block.extend_tiles, block, partition, *new)
            layers.append(layer)
        return x[:, 0], layers

    def embed(self, input_ids: Int[Array, "B T"], partition: Partition) -> Float[Array, "B T D"]:
        """Embeddings of the ids, of this device's tokens; each device looks up what its part of the table has."""
        table = partition.whole(self.embedding)
        if partition.size(*VOCABULARY) == 1:
            return _looked_up(table, input_ids, partition.platform)
        local = input_ids - partition.index(*VOCABULARY) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        rows = _looked_up(table, jnp.where(here, local, 0), partition.platform)
        return partition.join(jnp.where(here[..., None], rows, 0))

    def logits(self, normed: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The head on hidden states after norm_f, in float32; on a mesh, of this device's part of the vocabulary.

        Entries that only fill the vocabulary up are the least number: they are never chosen and weigh nothing.
        """
        head = self.partition.whole(self.lm_head)
        rows = normed.reshape(-1, normed.shape[-1])
        logits = linear(rows, head, 1, self.partition.platform, jnp.float32).reshape(*normed.shape[:-1], -1)
        if self.partition.pad_vocabulary(self.config.vocab_size) == self.config.vocab_size:
            return logits
        ids = self.partition.index(*VOCABULARY) * head.shape[0] + jnp.arange(head.shape[0])
        return jnp.where(ids < self.config.vocab_size, logits, jnp.finfo(jnp.float32).min)


def _looked_up(table: Weight, ids: Int[Array, "B T"], platform: str) -> Float[Array, "B T D"]:
    """Rows of the embedding."""
    if platform == "cpu" and isinstance(table, Array) and table.dtype == jnp.bfloat16:
        # As integers: XLA of JAX 0.10 looks them up in a copy of the whole table in float32.
        # Tied to the ids, or a loop over tokens would make such a copy of the integers ahead.
        here, ids = lax.optimization_barrier((table, ids))
        return lax.bitcast_convert_type(lax.bitcast_convert_type(here, jnp.uint16)[ids], jnp.bfloat16)
    return dequantized(table[ids])


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

    def merge(self) -> DbrxForCausalLM:
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


def split(model: DbrxForCausalLM) -> SplitModel:
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


def check_ids(input_ids: Any, vocab_size: int) -> Array | np.ndarray:
    """Token ids as an integer array (B, T).

    Raises:
      GenerationError: they are not integers in two dimensions, or (outside of jit) not all in the vocabulary.
    """
    ids = _array("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise GenerationError(f"input_ids: expected integers of shape (batch, tokens), got {ids.dtype} {ids.shape}")
    if isinstance(ids, np.ndarray) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise GenerationError(f"input_ids: expected ids from 0 to {vocab_size - 1} (the model's vocabulary), got {bad}")
    return ids


def _array(name: str, value: Any) -> Array | np.ndarray:
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise GenerationError(f"{name}: its rows have different lengths; pad them") from None


def _same_shape(name: str, value: Any, ids: Array | np.ndarray) -> Array | np.ndarray:
    array = _array(name, value)
    if array.shape != ids.shape:
        raise GenerationError(f"{name}: expected the shape of input_ids {ids.shape}, got {array.shape}")
    return array


@partial(jax.jit, static_argnums=(4, 5))
def _forward(parts, ids, mask, positions, output_hidden_states, output_router_probs):
    model = parts.merge()
    partition = model.partition.with_split(ids.shape[1])

    def run(parts, ids, mask, positions):
        model = parts.merge()
        states, routings = model.hidden(ids, mask, positions)
        logits = model.logits(partition.all_tokens(states[-1]))
        probs = [r.probs.reshape(*ids.shape, -1) for r in routings]
        return CausalLMOutput(logits, states if output_hidden_states else None, probs if output_router_probs else None)

    rows = partition.place(ROWS, None)
    tokens = partition.place(ROWS, "expert" if partition.split else None, None)
    places = CausalLMOutput(
        partition.place(ROWS, None, VOCABULARY),
        [tokens] * (model.config.n_layers + 1) if output_hidden_states else None,
        [partition.place(ROWS, None, None)] * model.config.n_layers if output_router_probs else None,
    )
    return partition.over(run, (parts.places(), rows, rows, rows), places)(parts, ids, mask, positions)
