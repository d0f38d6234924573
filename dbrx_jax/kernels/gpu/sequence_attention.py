"""Attention among a sequence's own tokens on a GPU: cuDNN's, through JAX, with its gradients.

cuDNN knows no mask but a causal one and each row's length. So a row's valid tokens are put first, in their
order, and its results back in their places: that serves padding on either side, and holes.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

MIN_TOKENS = 64  # fewer are not worth a kernel


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether cuDNN supports queries (B, T, H, K) and keys (B, S, G, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[1]
    one_dtype = query.dtype == key.dtype == value.dtype == jnp.bfloat16
    # On several devices each has a part of the queries, which begin at any key: not causal as cuDNN means it.
    return one_dtype and MIN_TOKENS <= T == S and K <= 128 and K % 8 == 0


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    valid: Bool[Array, "B T"],
    first: Int[Array, ""],
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Attention of each valid query to the valid keys up to it; 0 for the others.

    Args:
      first: 0, the place of the first query.
      interpret: JAX's own attention in cuDNN's place, on a CPU.
    """
    del first
    order = jnp.argsort(~valid, axis=1, stable=True)
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    used = (jnp.arange(valid.shape[1]) < lengths[:, None])[..., None, None]
    # cuDNN leaves results and gradients past a row's length undefined: replaced.
    q, k, v = (jnp.where(used, _taken(x, order), 0) for x in (query, key, value))
    some = jnp.maximum(lengths, 1)
    out = jax.nn.dot_product_attention(
        q, k, v,
        is_causal=True,
        query_seq_lengths=some,
        key_value_seq_lengths=some,
        implementation="xla" if interpret else "cudnn",
    )  # fmt: skip
    return _taken(jnp.where(used, out, 0), jnp.argsort(order, axis=1))


def _taken(x: Array, order: Array) -> Array:
    """x (B, T, heads, K) with each row's tokens in another order, of which the gradient is a plain scatter."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
