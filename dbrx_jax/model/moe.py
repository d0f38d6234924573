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


class Expert(nnx.Module):
    """The weights of one expert, each (F, D) as published: w2 is not transposed."""

    def __init__(self, config: DbrxConfig, init: Init):
        shape, axes = (config.ffn_hidden_size, config.d_model), ("ffn", "embed")
        self.w1, self.v1, self.w2 = (init.normal(shape, axes, config.initializer_range) for _ in range(3))


class MoE(nnx.Module):
    """Router and experts."""

    def __init__(self, config: DbrxConfig, init: Init):
        E, D = config.moe_num_experts, config.d_model
        self.router = init.normal((E, D), ("experts", "embed"), config.initializer_range)
        self.experts = nnx.List([Expert(config, init) for _ in range(E)])
        self.top_k = config.moe_top_k
        self.norm = config.moe_normalize_expert_weights
        self.jitter = config.moe_jitter_eps
        self.activation = config.ffn_act_fn

    def __call__(
        self, x: Float[Array, "N D"], valid: Bool[Array, "N"] | None = None, jitter_key: Array | None = None
    ) -> tuple[Float[Array, "N D"], Routing]:
        """The layer's output and what the router decided.

        Args:
          valid: False for padding, which is not computed and gives 0.
          jitter_key: in training, the random key of the router's jitter where the configuration has one.
        """
        seen = x
        if jitter_key is not None and self.jitter is not None:
            noise = jax.random.uniform(jitter_key, x.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
            seen = x * noise.astype(x.dtype)
        routing = route(seen @ self.router[...].T, self.top_k, self.norm)
        if len(self.experts) == 1:  # a dense model: softmax over one expert gives the weight 1
            return expert_mlp(x, *self._weights().one(0), self.activation), routing
        y = apply_experts(x, routing.weights, routing.experts, self._weights(), self.activation, valid)
        return y, routing

    def _weights(self) -> ExpertWeights:
        return ExpertWeights(*(tuple(getattr(e, name)[...] for e in self.experts) for name in ExpertWeights._fields))
