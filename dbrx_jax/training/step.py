"""The training loss of DBRX and one optimiser step on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import parameter_partition_specs
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.ops.routing import load_balancing_loss
from dbrx_jax.sharding.partition import BATCH_AXES


class Losses(NamedTuple):
    """Scalars of one batch, float32."""

    total: Array  # the objective: cross_entropy + moe_loss_weight * balance
    cross_entropy: Array  # mean over predicted tokens, nats
    balance: Array  # the auxiliary loss per layer: 1 when experts are balanced, E / K when collapsed


def losses(
    model: CausalLM, tokens: Int[Array, "B T"], loss_mask: Float[Array, "B T"], jitter_key: Array | None = None
) -> Losses:
    """Computes next-token cross entropy and the load-balancing loss.

    On a mesh each device calls this inside shard_map, on its rows. There is no dropout: resid_pdrop, emb_pdrop and
    attn_pdrop of a config.json are not read.

    Args:
      tokens: a batch of token ids, packed without padding; position t predicts token t + 1.
      loss_mask: 1 for tokens that count in the loss; the first of a row is never predicted.
      jitter_key: random key of the router's jitter, if the configuration has one.
    """
    inputs, targets, weight = tokens[:, :-1], tokens[:, 1:], loss_mask[:, 1:].astype(jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    states, routings = model.hidden(inputs, jnp.ones(inputs.shape, bool), positions, jitter_key)
    partition = model.partition.with_tokens_split(inputs.shape[1])
    nll = -log_probability(model.logits(partition.gather_tokens(states[-1])), targets, partition)
    num_predicted = partition.psum(weight.sum(), *BATCH_AXES)
    cross_entropy = partition.psum(jnp.sum(nll * weight), *BATCH_AXES) / jnp.maximum(num_predicted, 1)
    balance = load_balancing_loss(routings, partition=partition)
    return Losses(cross_entropy + model.config.moe_loss_weight * balance, cross_entropy, balance)


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, Losses, Array]]:
    """Returns a jitted step(params, optimizer_state, tokens, loss_mask, key) -> params, optimizer_state, losses, norm.

    `params` is the model's state as nnx.split returns it beside `graph`; it and the optimiser's state are donated.
    `key` is the random key of the router's jitter, or None; `norm` is that of the gradients.
    """

    def step(params, optimizer_state, tokens, loss_mask, key=None):
        partition = nnx.merge(graph, params).partition
        rows, replicated = partition.array_spec(BATCH_AXES, None), partition.array_spec()
        in_specs = (parameter_partition_specs(params, partition), rows, rows, replicated)
        out_specs = Losses(replicated, replicated, replicated)

        def run(params, tokens, loss_mask, key):
            return losses(nnx.merge(graph, params), tokens, loss_mask, key)

        def loss(params):
            result = partition.shard_map(run, in_specs, out_specs)(params, tokens, loss_mask, key)
            return result.total, result

        gradients, result = jax.grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, result, optax.tree.norm(gradients)

    return jax.jit(step, donate_argnums=(0, 1))
