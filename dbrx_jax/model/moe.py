"""The mixture-of-experts feed-forward layer of one block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.experts import TokenKernels, apply_experts, apply_token_experts, token_kernels
from dbrx_jax.kernels.linear import linear
from dbrx_jax.model.parameter import Init
from dbrx_jax.ops.experts import ExpertWeights, expert_mlp
from dbrx_jax.ops.linear import Weight
from dbrx_jax.ops.routing import Routing, route
from dbrx_jax.ops.row_tiles import pad_rows
from dbrx_jax.sharding.partition import BATCH_AXES, Partition


class Expert(nnx.Module):
    """The weights of an expert, each (F, D) as published (w2 is not transposed), or of several, (num_experts, F, D)."""

    def __init__(self, config: DbrxConfig, init: Init, num_experts: int):
        shape: tuple[int, ...] = (config.ffn_hidden_size, config.d_model)
        axes: tuple[str, ...] = ("ffn", "embed")
        if num_experts > 1:
            shape, axes = (num_experts, *shape), ("experts", *axes)
        std = config.initializer_range
        self.w1, self.v1 = (init.normal(shape, axes, std, "experts") for _ in range(2))
        self.w2 = init.normal(shape, axes, std, "experts", contracted=(-2,))


class MoE(nnx.Module):
    """Router and experts. Device x of X along `expert` has experts x E/X to (x + 1) E/X.

    With kernels all experts are in one array (E, F, D), which the kernels index. Without kernels each expert of a
    device is in an array of its own, and an array (X, F, D) holds one expert of each device.
    """

    def __init__(self, config: DbrxConfig, init: Init):
        E, D = config.moe_num_experts, config.d_model
        self.router = init.normal((E, D), ("replicated", "replicated"), config.initializer_range)
        num_arrays = init.partition.expert_arrays(E)
        self.experts = nnx.List([Expert(config, init, E // num_arrays) for _ in range(num_arrays)])
        self.num_experts = E
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
        """Returns the layer's output for this device's tokens, and the routing of all tokens, (B * T, …).

        Args:
          valid: of all tokens; False for padding, which is not computed and gives 0.
          jitter_key: in training, the random key of the router's jitter if the configuration has one.
        """
        if partition.tokens_split and partition.all_to_all and not self.dense:
            return self._all_to_all(x, partition, valid, jitter_key)
        x = partition.gather_tokens(x)
        routing = self.route(x, partition, jitter_key)
        return self.combine(x, routing, partition, valid), routing

    def decode(
        self, x: Float[Array, "P 1 D"], partition: Partition, valid: Bool[Array, "R 1"]
    ) -> Float[Array, "P 1 D"]:
        """Returns the layer's output for one new token of each row, without their routing.

        Args:
          x: R rows, then rows of padding, which get 0.
        """
        rows = x[: len(valid)]
        return pad_rows(self.combine(rows, self.route(rows, partition), partition, valid), len(x))

    def token_kernels(self, x: Float[Array, "P 1 D"], partition: Partition) -> TokenKernels | None:
        """Returns the kernels of :meth:`decode_token`, or None."""
        if self.dense:
            return None
        return token_kernels(x[0], self.router[...], self.norm, self._local_weights(partition), partition.platform)

    def decode_token(
        self,
        kernels: TokenKernels,
        x: Float[Array, "P 1 D"],
        y: Float[Array, "P 1 D"],
        norm_scale: Float[Array, "D"],
        partition: Partition,
        valid: Bool[Array, "1 1"],
    ) -> Float[Array, "P 1 D"]:
        """Returns x + y, plus the layer's output for the norm of this sum, for the token of the first row."""
        weights, first = self._local_weights(partition), self._first_expert(partition)
        arguments = x[:, 0], y[:, 0], norm_scale, self.router[...], valid[0, 0], first
        total, out = apply_token_experts(kernels, *arguments, weights, self.top_k, self.norm, self.activation)
        return pad_rows((total + partition.reduce_tokens(out[None])[0])[None], len(x))

    def combine(
        self,
        x: Float[Array, "B T D"],
        routing: Routing,
        partition: Partition,
        valid: Bool[Array, "B T"] | None = None,
        row_tile: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the weighted sum of the routed experts' outputs, for the tokens of this device.

        Args:
          row_tile: as in :func:`apply_experts`.
        """
        rows, weights = x.reshape(-1, x.shape[-1]), self._local_weights(partition)
        if self.dense:  # softmax over one expert gives the weight 1
            y = expert_mlp(rows, *weights.expert(0), self.activation, partition.platform)
        else:
            experts = routing.experts - self._first_expert(partition)
            valid = None if valid is None else valid.reshape(-1)
            platform = partition.platform
            y = apply_experts(rows, routing.weights, experts, weights, self.activation, valid, platform, row_tile)
        return partition.reduce_tokens(y.reshape(x.shape))

    def _all_to_all(
        self, x: Float[Array, "B T D"], partition: Partition, valid: Bool[Array, "B S"] | None, jitter_key: Array | None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Sends each token to the devices of its experts and the outputs back, by ragged all-to-all."""
        routing = self.route(x, partition, jitter_key)
        (B, T, D), num_devices, device = x.shape, partition.size("expert"), partition.axis_index("expert")
        experts_per_device = self.num_experts // num_devices
        experts = routing.experts
        if valid is not None:  # padding gets an expert that no device has
            experts = jnp.where(partition.local_tokens(valid).reshape(-1, 1), experts, self.num_experts)
        experts = experts.reshape(-1)  # of the B * T * top_k pairs of token and expert
        order = jnp.argsort(experts, stable=True)
        rows = x.reshape(-1, D)[order // self.top_k]
        sizes = jnp.sum(experts[:, None] // experts_per_device == jnp.arange(num_devices), axis=0)
        sizes = partition.all_gather(sizes[None], 0, "expert")  # (senders, receivers)
        buffer_size = num_devices * B * T * min(self.top_k, experts_per_device)  # if all tokens came to this device
        received = partition.ragged_all_to_all(rows, sizes, buffer_size)
        # Sent plus 1, so that the zeros that pad the buffer become experts below those of this device.
        received_experts = partition.ragged_all_to_all(experts[order] + 1, sizes, buffer_size) - 1
        local_experts = (received_experts - device * experts_per_device)[:, None]
        weights, ones = self._local_weights(partition), jnp.ones((buffer_size, 1), x.dtype)
        is_used = jnp.arange(buffer_size) < sizes[:, device].sum()
        outputs = apply_experts(received, ones, local_experts, weights, self.activation, is_used, partition.platform)
        returned = partition.ragged_all_to_all(outputs, sizes.T, len(experts))[jnp.argsort(order)]
        y = jnp.sum(returned.reshape(-1, self.top_k, D) * routing.weights[..., None].astype(x.dtype), axis=1)
        gathered = [partition.gather_tokens(a.reshape(B, T, -1)).reshape(-1, a.shape[-1]) for a in routing]
        return partition.psum(y.reshape(x.shape), "tensor"), Routing(*gathered)

    def route(self, x: Float[Array, "B T D"], partition: Partition, jitter_key: Array | None = None) -> Routing:
        """Routes each token to its experts, with the same result on every device that has the token."""
        inputs = x.reshape(-1, x.shape[-1])
        if jitter_key is not None and self.jitter is not None:
            token_axes = (*BATCH_AXES, "expert") if partition.all_to_all else BATCH_AXES  # devices with other tokens
            if partition.size(*token_axes) > 1:
                jitter_key = jax.random.fold_in(jitter_key, partition.axis_index(*token_axes))
            noise = jax.random.uniform(jitter_key, inputs.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter)
            inputs = inputs * noise.astype(inputs.dtype)
        return route(linear(inputs, self.router[...], 1, partition.platform), self.top_k, self.norm)

    def _first_expert(self, partition: Partition) -> Array | int:
        """Returns the number of this device's first expert."""
        return partition.axis_index("expert") * (self.num_experts // partition.size("expert"))

    def _local_weights(self, partition: Partition) -> ExpertWeights:
        """Returns the weights of this device's experts, gathered over `fsdp`."""

        def gather(name: str) -> Weight | tuple[Weight, ...]:
            weights = [partition.gather_fsdp(getattr(e, name)) for e in self.experts]
            if partition.expert_arrays(self.num_experts) == 1 and weights[0].ndim == 3:
                return weights[0]
            return tuple(w[0] if w.ndim == 3 else w for w in weights)

        return ExpertWeights(*map(gather, ExpertWeights._fields))
