"""Filters of the next token's distribution: top-k, top-p, min-p, typical, epsilon and eta sampling.

Each gives the logits of tokens that it removes the value -inf. They agree with the logits warpers of transformers
4.57, ties included. Logits stay split over the vocabulary on a mesh, so thresholds are found by binary search over
float32 numbers: sorting takes longer, and needs the whole vocabulary on one device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.generation.rows import take_rows
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition


class Nucleus(NamedTuple):
    """Parameters of top-k, top-p and min-p; without effect: the vocabulary's size, 1 and 0."""

    top_k: Int[ArrayLike, "M"]
    top_p: Float[ArrayLike, "M"]
    min_p: Float[ArrayLike, "M"]


class Filters(NamedTuple):
    """Filters in the order in which they apply; None is off and adds nothing to the program.

    Each array has a dimension of M slots in front, or of 1 if all rows share a value.
    """

    nucleus: Nucleus | None = None
    typical_p: Float[ArrayLike, "M"] | None = None
    epsilon_cutoff: Float[ArrayLike, "M"] | None = None
    eta_cutoff: Float[ArrayLike, "M"] | None = None


def filter_logits(
    logits: Float[Array, "R V"], filters: Filters, slots: Int[Array, "R"], partition: Partition
) -> Float[Array, "R V"]:
    """Applies all filters that are on to logits, on a mesh to this device's shard of the vocabulary.

    A filter that would remove no token of any row is not computed.
    """
    if filters.nucleus is not None:
        top_k, top_p, min_p = (take_rows(a, slots) for a in filters.nucleus)
        size = logits.shape[1] * partition.size(*VOCAB_AXES)
        logits = lax.cond(jnp.any(top_k < size), lambda x: keep_top_k(x, top_k, partition), lambda x: x, logits)
        logits = lax.cond(jnp.any(top_p < 1), lambda x: keep_top_p(x, top_p, partition), lambda x: x, logits)
        logits = keep_min_p(logits, min_p[:, None], partition)
    if filters.typical_p is not None:
        mass = take_rows(filters.typical_p, slots)
        logits = lax.cond(jnp.any(mass < 1), lambda x: keep_typical(x, mass, partition), lambda x: x, logits)
    if filters.epsilon_cutoff is not None:
        cutoff = take_rows(filters.epsilon_cutoff, slots)[:, None]
        logits = lax.cond(jnp.any(cutoff > 0), lambda x: keep_above(x, cutoff, partition), lambda x: x, logits)
    if filters.eta_cutoff is not None:
        epsilon = take_rows(filters.eta_cutoff, slots)[:, None]
        logits = lax.cond(jnp.any(epsilon > 0), lambda x: _keep_eta(x, epsilon, partition), lambda x: x, logits)
    return logits


def _keep_eta(logits: Float[Array, "R V"], epsilon: Float[Array, "R 1"], partition: Partition) -> Float[Array, "R V"]:
    """Keeps tokens above a probability that falls with the entropy (Hewitt et al. 2022, arXiv:2210.15191)."""
    logp = log_softmax(logits, partition)
    cutoff = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(logp, partition)))
    return keep_above(logits, cutoff, partition)


def keep_top_k(logits: Float[Array, "B V"], top_k: ArrayLike, partition: Partition) -> Float[Array, "B V"]:
    """Keeps the k largest logits of each row, and all that equal the k-th."""

    def reaches_top_k(threshold: Array) -> Array:
        """Returns whether at least k logits are not below the threshold."""
        count = (logits >= threshold[:, None]).sum(axis=-1, dtype=jnp.int32)
        return partition.psum(count, *VOCAB_AXES) >= top_k

    kth = _largest_float(reaches_top_k, logits.shape[0])
    return jnp.where(logits >= kth[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], top_p: ArrayLike, partition: Partition) -> Float[Array, "B V"]:
    """Keeps the fewest most probable tokens that together reach top_p (Holtzman et al. 2019, arXiv:1904.09751).

    Of equal logits at the boundary it keeps as many as are needed, those with the highest ids. The most probable token
    always stays.
    """
    largest = _largest_logit(logits, partition)
    weights = jnp.exp(logits - largest)
    needed = top_p * partition.psum(weights.sum(axis=-1), *VOCAB_AXES)

    def weight_above(threshold: Array) -> Array:
        return partition.psum(jnp.where(logits > threshold[:, None], weights, 0).sum(axis=-1), *VOCAB_AXES)

    removed = _largest_float(lambda threshold: weight_above(threshold) >= needed, logits.shape[0])[:, None]
    least = -partition.pmax(-jnp.min(jnp.where(logits > removed, logits, jnp.inf), axis=-1), *VOCAB_AXES)
    least = jnp.minimum(least, largest[:, 0])
    tied = logits == least[:, None]
    num_tied = tied.sum(axis=-1, dtype=jnp.int32)
    wanted = jnp.ceil((needed - weight_above(least)) / jnp.exp(least - largest[:, 0]))
    num_kept = jnp.maximum(wanted, 1).astype(jnp.int32)
    num_later = _on_later_shards(num_tied, partition)

    def without_excess_ties(tied: Array) -> Array:
        rank = jnp.cumsum(tied[:, ::-1], axis=-1)[:, ::-1]  # 1 is the highest id of this shard
        return tied & (rank + num_later[:, None] <= num_kept[:, None])

    is_excess = jnp.any(partition.psum(num_tied, *VOCAB_AXES) > num_kept)
    tied = lax.cond(is_excess, without_excess_ties, lambda tied: tied, tied)
    is_kept = (logits > least[:, None]) | tied | jnp.greater_equal(top_p, 1)[..., None]
    return jnp.where(is_kept, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], min_p: ArrayLike, partition: Partition) -> Float[Array, "B V"]:
    """Keeps tokens at least min_p times as probable as the most probable (Nguyen et al. 2024, arXiv:2407.01082)."""
    return jnp.where(logits >= _largest_logit(logits, partition) + jnp.log(min_p), logits, -jnp.inf)


def keep_typical(logits: Float[Array, "B V"], mass: ArrayLike, partition: Partition) -> Float[Array, "B V"]:
    """Keeps tokens whose surprise is closest to the entropy, until they reach a probability of `mass`.

    Locally typical sampling: Meister et al. 2022, arXiv:2202.00666.
    """
    logp = log_softmax(logits, partition)
    probs, distance = jnp.exp(logp), jnp.abs(-logp - _entropy(logp, partition))

    def is_below_mass(threshold: Array) -> Array:
        total = jnp.where(distance < threshold[:, None], probs, 0).sum(axis=-1)
        return partition.psum(total, *VOCAB_AXES) < mass

    farthest = _largest_float(is_below_mass, logits.shape[0])
    is_kept = (distance <= farthest[:, None]) | jnp.greater_equal(mass, 1)[..., None]
    return jnp.where(is_kept, logits, -jnp.inf)


def keep_above(logits: Float[Array, "B V"], cutoff: ArrayLike, partition: Partition) -> Float[Array, "B V"]:
    """Keeps tokens of at least a probability, which may differ by row (B, 1), and the most probable.

    Epsilon and eta sampling: Hewitt et al. 2022, arXiv:2210.15191.
    """
    is_kept = jnp.exp(log_softmax(logits, partition)) >= cutoff
    return jnp.where(is_kept | (logits == _largest_logit(logits, partition)), logits, -jnp.inf)


def can_sample(logits: Float[Array, "B V"], partition: Partition) -> Bool[Array, "B"]:
    """Returns for each row whether a token is left, besides the vocabulary's padding, and no logit is NaN."""
    is_left = (logits > jnp.finfo(jnp.float32).min).any(axis=-1)
    is_nan = jnp.isnan(logits).any(axis=-1)  # which a maximum over devices may lose
    is_left, is_nan = (partition.pmax(a.astype(jnp.int32), *VOCAB_AXES) > 0 for a in (is_left, is_nan))
    return is_left & ~is_nan


def log_softmax(logits: Float[Array, "B V"], partition: Partition) -> Float[Array, "B V"]:
    """Returns the log-probabilities of all tokens, in nats."""
    shifted = logits - _largest_logit(logits, partition)
    return shifted - jnp.log(partition.psum(jnp.exp(shifted).sum(axis=-1, keepdims=True), *VOCAB_AXES))


def _entropy(logp: Float[Array, "B V"], partition: Partition) -> Float[Array, "B 1"]:
    """Returns the entropy of log-probabilities in nats; tokens of probability 0 add nothing."""
    terms = jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0)
    return -partition.psum(terms.sum(axis=-1, keepdims=True), *VOCAB_AXES)


def _largest_logit(logits: Float[Array, "B V"], partition: Partition) -> Float[Array, "B 1"]:
    return partition.pmax(logits.max(axis=-1, keepdims=True), *VOCAB_AXES)


def _on_later_shards(count: Int[Array, "B"], partition: Partition) -> Int[Array, "B"]:
    """Returns the sum of the counts of the devices with higher token ids."""
    num_shards = partition.size(*VOCAB_AXES)
    if num_shards == 1:
        return jnp.zeros_like(count)
    is_own = jnp.arange(num_shards)[:, None] == partition.axis_index(*VOCAB_AXES)
    counts = partition.psum(jnp.where(is_own, count, 0), *VOCAB_AXES)  # (shards, B)
    is_later = jnp.arange(num_shards)[:, None] > partition.axis_index(*VOCAB_AXES)
    return jnp.where(is_later, counts, 0).sum(axis=0)


def _largest_float(condition: Callable[[Array], Bool[Array, "B"]], rows: int) -> Float[Array, "B"]:
    """Returns each row's largest float32 that meets a condition, or the least float32 if none does.

    A binary search over the bits of the index of :func:`_nth_float`.

    Args:
      condition: true up to some number and false above it.
    """

    def set_bit(i: Array, prefix: Array) -> Array:
        candidate = prefix | (jnp.uint32(1) << jnp.uint32(31 - i))
        return jnp.where(condition(_nth_float(candidate)), candidate, prefix)

    return _nth_float(lax.fori_loop(0, 32, set_bit, jnp.zeros(rows, jnp.uint32)))


def _nth_float(index: Array) -> Array:
    """Returns the float32 at an index in ascending order of all float32 numbers; NaNs become infinite."""
    is_positive = index >> 31
    bits = jnp.where(is_positive, index ^ jnp.uint32(1 << 31), ~index)
    value = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), jnp.where(is_positive, jnp.inf, -jnp.inf), value)
