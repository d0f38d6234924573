"""Routing of tokens to the top-k experts, and the auxiliary load-balancing loss."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from dbrx_jax.sharding.partition import BATCH_AXES, ONE_DEVICE, Partition


class Routing(NamedTuple):
    """Routing of N tokens, each to K of E experts."""

    probs: Float[Array, "N E"]  # float32, over all experts
    weights: Float[Array, "N K"]  # float32, of the top-k experts
    experts: Int[Array, "N K"]  # the top-k experts, most probable first


def route(logits: Float[Array, "N E"], top_k: int, norm: float | None) -> Routing:
    """Selects the `top_k` experts by softmax in float32; their weights are divided by their p-norm, p = `norm`.

    Ties go to the expert with the lower index. If `norm` is None, the weights are not normalised.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probs, top_k)
    if norm is not None:
        weights = weights / jnp.linalg.norm(weights, ord=norm, axis=-1, keepdims=True)
    return Routing(probs, weights, experts)


def load_balancing_loss(
    layers: Sequence[Routing],
    valid: Float[Array, "N"] | None = None,
    pooled: bool = False,
    partition: Partition = ONE_DEVICE,
) -> Float[Array, ""]:
    """Computes the auxiliary loss, which is least when every expert gets the same fraction of the tokens.

    Per layer (MegaBlocks, Gale et al. 2022, arXiv:2211.15841; DBRX was trained with it):
    E / (N K) * sum_e tokens_e * mean_prob_e, averaged over layers; 1 if balanced, E / K if all tokens
    go to the same experts. Pooled (transformers from 4.54 on): counts and probabilities are averaged
    over layers first, and the loss is K times as large; K if balanced.

    Args:
      layers: the routing of each layer, for the same N tokens.
      valid: 1 for tokens and 0 for padding; None means no padding.
      partition: the mesh over which the tokens are sharded; the loss is that of all tokens.
    """
    fractions, means = [], []
    for probs, _, experts in layers:
        num_tokens, num_experts = probs.shape
        one_hot = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)  # (N, E)
        weight = jnp.ones(num_tokens) if valid is None else valid.astype(jnp.float32)
        total = jnp.maximum(partition.psum(weight.sum(), *BATCH_AXES), 1.0)
        fractions.append(partition.psum(weight @ one_hot, *BATCH_AXES) / total)
        means.append(partition.psum(weight @ probs, *BATCH_AXES) / total)
    fraction, mean_prob = jnp.stack(fractions), jnp.stack(means)  # (L, E) each; a row of fraction sums to K
    num_experts, top_k = fraction.shape[1], layers[0].experts.shape[1]
    if pooled:
        return num_experts * jnp.sum(fraction.mean(axis=0) * mean_prob.mean(axis=0))
    return num_experts / top_k * jnp.sum(fraction * mean_prob, axis=1).mean()
