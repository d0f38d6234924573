"""From logits to the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key


class Sampling(NamedTuple):
    """The numbers of the processors, float32 scalars so that changing one compiles nothing anew.

    Values that switch a processor off: temperature 1, top_k the vocabulary's size, top_p 1, min_p 0,
    repetition_penalty 1.
    """

    temperature: ArrayLike
    top_k: ArrayLike  # int32
    top_p: ArrayLike
    min_p: ArrayLike
    repetition_penalty: ArrayLike


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: Key[Array, "B"] | None,
    positions: Int[Array, "B"],
    sampling: Sampling,
    filtered: bool,
) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
      logits: float32, as the model gives them.
      seen: the tokens that stand in the row already, prompt included.
      keys: each row's random key; None takes the most probable token, the lowest id among equals.
      positions: of the tokens to be chosen. The random numbers depend on key and position alone.
      filtered: whether top-k, top-p or min-p does anything.
    """
    penalty = sampling.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if filtered:
        logits = jnp.where(logits >= _threshold(logits, sampling), logits, -jnp.inf)
    noise = jax.vmap(lambda key, p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[1:]))(keys, positions)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def _threshold(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The least logit that top-k, then top-p (Holtzman et al. 2019, arXiv:1904.09751) and then min-p
    (Nguyen et al. 2024, arXiv:2407.01082) leave in. Equal logits stay or go together."""
    descending = -jnp.sort(-logits, axis=-1)
    kth = jnp.take_along_axis(descending, jnp.broadcast_to(sampling.top_k - 1, (logits.shape[0], 1)), axis=-1)
    probs = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # what is more probable than each
    # The most probable stays whatever top_p is.
    inside = (before < sampling.top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.maximum(jnp.maximum(kth, least), descending[:, :1] + jnp.log(sampling.min_p))


def row_keys(seeds: Int[Array, "B"], rows: Int[Array, "B"] | None) -> Key[Array, "B"]:
    """Each row's random key: of its own seed, or with `rows` of the seed folded with the row's number."""
    if rows is None:
        return jax.vmap(jax.random.key)(seeds)
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)
