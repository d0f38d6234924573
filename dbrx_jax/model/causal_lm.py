"""CausalLM: the network, on whole sequences or on new tokens with a key-value cache."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.backend import GPU_PLATFORMS
from dbrx_jax.config import DbrxConfig
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.kernels.attention import select_implementation
from dbrx_jax.kernels.linear import linear
from dbrx_jax.model.block import Block, Norm, call_block
from dbrx_jax.model.cache import Cache
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.linear import Weight, dequantized
from dbrx_jax.ops.routing import Routing
from dbrx_jax.ops.row_tiles import map_row_tiles, num_row_tiles, pad_rows
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition, check_all_to_all, check_mesh

# Rows of hidden states of a decode step on GPUs at least. For one row XLA makes several kernels of a layer norm, of the
# projections to query, key and value, and of the router, for four of each one: matrix units take eight at once anyway.
GPU_ROWS = 4


class CausalLM(nnx.Module):
    """The network of DBRX with its language-model head; :class:`dbrx_jax.DbrxForCausalLM` loads and generates.

    Args:
      config: sizes and hyperparameters.
      rngs: random keys of the initial weights (stream "params"); None makes parameters that are shapes only.
      dtype: of weights and activations; the configuration's by default.
      mesh: the devices to partition the model over, see :mod:`dbrx_jax.sharding.partition`; None is one device.
      all_to_all: as in :meth:`dbrx_jax.DbrxForCausalLM.from_pretrained`.
      quantization: how weights are quantised, see :mod:`dbrx_jax.quantization.array`; None leaves them plain.
      attention_implementation: as in :meth:`dbrx_jax.DbrxForCausalLM.from_pretrained`.

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
        select_implementation(attention_implementation, self.partition.platform)  # or raises
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
        self.checkpoint_path: Path | None = None  # of the folder that it was loaded from

    @property
    def dtype(self) -> np.dtype:
        """The dtype of weights and activations."""
        return self.embedding.get_value().dtype

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        jitter_key: Array | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], list[Routing]]:
        """Returns hidden states (embeddings, then after each block; the last is after norm_f) and layers' routing.

        On a mesh each device calls this inside shard_map, on its rows; the states are of its own tokens.

        Args:
          mask: False for padding.
          jitter_key: in training, the random key of the router's jitter.
        """
        partition = self.partition.with_tokens_split(input_ids.shape[1])
        states, routings = [self.embed(input_ids, partition)], []
        for i, block in enumerate(self.blocks):
            key = None if jitter_key is None else jax.random.fold_in(jitter_key, i)
            with jax.named_scope(f"block_{i}"):
                x, routing = call_block(Block.sequence, block, partition, states[-1], positions, mask, key)
            states.append(x)
            routings.append(routing)
        states[-1] = self.norm_f(states[-1])
        return states, routings

    def forward_with_cache(
        self,
        input_ids: Int[Array, "R T"],
        valid: Bool[Array, "R T"],
        positions: Int[Array, "R T"],
        cache: Cache,
        table: Int[Array, "R W"],
    ) -> tuple[Float[Array, "R T D"], Cache]:
        """Runs new tokens at `positions` of rows with these tables of blocks; returns hidden states and the cache.

        On a mesh each device calls this inside shard_map, on its rows. The states are those before norm_f, of all
        tokens of these rows.

        Args:
          valid: False for padding, which changes nothing that is used later.
        """
        partition = self.partition.with_tokens_split(input_ids.shape[1])
        rows, layers = self.embed(input_ids, partition), []
        x = pad_rows(rows, GPU_ROWS) if partition.platform in GPU_PLATFORMS and rows.shape[1] == 1 else rows
        for i, (block, layer) in enumerate(zip(self.blocks, cache, strict=True)):
            with jax.named_scope(f"block_{i}"):
                x, layer = call_block(Block.forward_with_cache, block, partition, x, valid, positions, layer, table)
            layers.append(layer)
        return partition.gather_tokens(x[: len(rows)]), layers

    def decode_in_row_tiles(
        self,
        input_ids: Int[Array, "R"],
        valid: Bool[Array, "R"],
        positions: Int[Array, "R"],
        cache: Cache,
        table: Int[Array, "R W"],
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Runs one new token of each row like :meth:`forward_with_cache`, with bits that do not depend on R.

        R is a multiple of ROW_TILE. Attention and router run on tiles of rows, experts on all rows together.
        """
        partition, count = self.partition, num_row_tiles(input_ids.shape[0], positions)
        # In a loop of its own: otherwise XLA fuses a scale with a later sum for some numbers of rows.
        x, _ = map_row_tiles(lambda _, ids, none: (self.embed(ids[:, None], partition), none), input_ids, None, count)
        layers = []
        for i, (block, layer) in enumerate(zip(self.blocks, cache, strict=True)):
            with jax.named_scope(f"block_{i}"):
                inputs = x, valid, positions, layer, table, count
                x, layer = call_block(Block.decode_in_row_tiles, block, partition, *inputs)
            layers.append(layer)
        return x[:, 0], layers

    def embed(self, input_ids: Int[Array, "B T"], partition: Partition) -> Float[Array, "B T D"]:
        """Returns the embeddings of this device's tokens; each device looks up ids in its shard of the table."""
        table = partition.gather_fsdp(self.embedding)
        if partition.size(*VOCAB_AXES) == 1:
            return _embedding_rows(table, input_ids, partition.platform)
        local_ids = input_ids - partition.axis_index(*VOCAB_AXES) * table.shape[0]
        is_local = (local_ids >= 0) & (local_ids < table.shape[0])
        rows = _embedding_rows(table, jnp.where(is_local, local_ids, 0), partition.platform)
        return partition.reduce_tokens(jnp.where(is_local[..., None], rows, 0))

    def logits(self, normed: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Applies the head to hidden states after norm_f, in float32; on a mesh, this device's vocabulary shard.

        Entries that pad the vocabulary get the least float, so that they are never sampled and have probability 0.
        """
        partition, vocab_size = self.partition, self.config.vocab_size
        head = partition.gather_fsdp(self.lm_head)
        rows = normed.reshape(-1, normed.shape[-1])
        logits = linear(rows, head, 1, partition.platform, jnp.float32).reshape(*normed.shape[:-1], -1)
        if partition.pad_vocabulary(vocab_size) == vocab_size:
            return logits
        ids = partition.axis_index(*VOCAB_AXES) * head.shape[0] + jnp.arange(head.shape[0])
        return jnp.where(ids < vocab_size, logits, jnp.finfo(jnp.float32).min)


def _embedding_rows(table: Weight, ids: Int[Array, "B T"], platform: str) -> Float[Array, "B T D"]:
    """Returns rows of the embedding table, dequantised."""
    if platform == "cpu" and isinstance(table, Array) and table.dtype == jnp.bfloat16:
        # As integers, because XLA of JAX 0.10 would look bfloat16 up in a float32 copy of the whole table.
        # The barrier makes the integers depend on the ids, or a loop over tokens would copy them before it starts.
        values, ids = lax.optimization_barrier((table, ids))
        return lax.bitcast_convert_type(lax.bitcast_convert_type(values, jnp.uint16)[ids], jnp.bfloat16)
    return dequantized(table[ids])
