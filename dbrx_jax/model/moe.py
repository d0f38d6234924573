"""The mixture-of-experts feed-forward layer of one block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from dbrx_jax.config import DbrxConfig
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.experts import ExpertWeights, apply_experts, expert_mlp
from dbrx_jax.ops.routing import Routing, route
from dbrx_jax.sharding import ROWS, Partition


class Expert(nnx.Module):
    """The weights of one expert, each (F, D) as published: w2 is not transposed.

    Where experts are split over devices, of the expert in this place on each of X devices: (X, F, D).
    """

    def __init__(self, config: DbrxConfig, init: Init):
        shape: tuple[int, ...] = (config.ffn_hidden_size, config.d_model)
        axes: tuple[str, ...] = ("ffn", "embed")
        if (devices := init.partition.size("expert")) > 1:
            shape, axes = (devices, *shape), ("experts", *axes)
        self.w1, self.v1, self.w2 = (init.normal(shape, axes, config.initializer_range) for _ in range(3))


class MoE(nnx.Module):
    """Router and experts. Device x of X along `expert` has experts x E/X to (x + 1) E/X, each in buffers of its own."""

    def __init__(self, config: DbrxConfig, init: Init):
        E, D = config.moe_num_experts, config.d_model
        self.router = init.normal((E, D), ("whole", "whole"), config.initializer_range)
        self.experts = nnx.List([Expert(config, init) for _ in range(E // init.partition.size("expert"))])
        self.dense = E == 1
        self.top_k = config.moe_top_k
        self.norm = config.moe_normalize_expert_weights
        self.jitter = config.moe_jitter_eps
        self.activation = config.ffn_act_fn

    def __call__(
        self,
        x: Float[Array, "B T D"],
        partition: Partition,
        valid: Bool[Array, "B T"] | None = None,
        jitter_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's output for this device's tokens, and what the router decided for all, (B * T, …).

        Args:
          valid: of all tokens; False for padding, which is not computed and gives 0.
          jitter_key: in training, the random key of the router's jitter where the configuration has one.
        """
        x = partition.all_tokens(x)
        rows = x.reshape(-1, x.shape[-1])
        seen = rows
        if jitter_key is not None and self.jitter is not None:
            key = jax.random.fold_in(jitter_key, partition.index(*ROWS)) if partition.size(*ROWS) > 1 else jitter_key
            noise = jax.random.uniform(key, rows.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
            seen = rows * noise.astype(rows.dtype)
        routing = route(seen @ self.router[...].T, self.top_k, self.norm)
        weights = self._weights(partition)
        if self.dense:  # softmax over one expert gives the weight 1
            y = expert_mlp(rows, *weights.one(0), self.activation)
        else:
            first = partition.index("expert") * len(self.experts)
            valid = None if valid is None else valid.reshape(-1)
            chosen = routing.experts - first
            y = apply_experts(
                rows, routing.weights, chosen, weights, self.activation, valid, platform=partition.platform
            )
        return partition.join(y.reshape(x.shape)), routing

    def _weights(self, partition: Partition) -> ExpertWeights:
        def local(parameter):
            weight = partition.whole(parameter)
            return weight[0] if weight.ndim == 3 else weight

        return ExpertWeights(*(tuple(local(getattr(e, name)) for e in self.experts) for name in ExpertWeights._fields))
