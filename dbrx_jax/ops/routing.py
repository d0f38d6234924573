"""The router: which experts a token goes to, with which weights, and the loss that keeps experts in balance."""

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
    weights: Float[Array, "N K"]  # float32, of the chosen experts
    experts: Int[Array, "N K"]  # the chosen experts, most probable first


def route(logits: Float[Array, "N E"], top_k: int, norm: float | None) -> Routing:
    """Softmax over all experts in float32, the top k, divided by their p-norm with p = `norm`.

    Ties go to the expert with the lower number. With `norm` None the weights stay as they are.
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
    """The auxiliary loss that is least when every expert gets the same share of tokens.

    Per layer (MegaBlocks, Gale et al. 2022, arXiv:2211.15841; DBRX was trained with it):
    E / (N K) * sum_e tokens_e * mean_prob_e, averaged over layers; 1 when balanced, E / K when
    all tokens choose the same experts. Pooled (transformers from 4.54 on): counts and
    probabilities of all layers in one bin, times K; K when balanced.

    Args:
      layers: the routing of each layer, for the same N tokens.
      valid: 1 for tokens that count and 0 for padding; None counts all.
      partition: where the tokens are those of one of several devices' rows; the loss is of all.
    """
    counts, means = [], []
    for probs, _, experts in layers:
        n, num_experts = probs.shape
        chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)  # (N, E)
        weight = jnp.ones(n) if valid is None else valid.astype(jnp.float32)
        total = jnp.maximum(partition.psum(weight.sum(), *BATCH_AXES), 1.0)
        counts.append(partition.psum(weight @ chosen, *BATCH_AXES) / total)
        means.append(partition.psum(weight @ probs, *BATCH_AXES) / total)
    share, mean_prob = jnp.stack(counts), jnp.stack(means)  # (L, E) each; a row of share sums to K
    num_experts, top_k = share.shape[1], layers[0].experts.shape[1]
    if pooled:
        return num_experts * jnp.sum(share.mean(axis=0) * mean_prob.mean(axis=0))
    return num_experts / top_k * jnp.sum(share * mean_prob, axis=1).mean()
