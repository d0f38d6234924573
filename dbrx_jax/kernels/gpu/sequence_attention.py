"""Causal attention of whole sequences on GPUs with cuDNN, through JAX, with gradients.

cuDNN supports only a causal mask and a length for each row. So each row's valid tokens are moved to its front, and the
results back: this supports padding on either side, and gaps.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

MIN_TOKENS = 64  # shorter sequences are left to XLA


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether cuDNN supports queries (B, T, H, K) and keys (B, S, G, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[1]
    is_bfloat16 = query.dtype == key.dtype == value.dtype == jnp.bfloat16
    # With T < S, on several devices, queries begin at any key, which cuDNN's causal mask does not support.
    return is_bfloat16 and MIN_TOKENS <= T == S and K <= 128 and K % 8 == 0


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    valid: Bool[Array, "B T"],
    first: Int[Array, ""],
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Computes attention of each valid query to the valid keys up to it; 0 for invalid queries.

    Args:
      first: position of the first query, always 0 here.
      interpret: uses JAX's own attention instead of cuDNN's, to run on a CPU.
    """
    del first
    order = jnp.argsort(~valid, axis=1, stable=True)
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    in_length = (jnp.arange(valid.shape[1]) < lengths[:, None])[..., None, None]
    # Results and gradients past a row's length, which cuDNN leaves undefined, are replaced.
    q, k, v = (jnp.where(in_length, _reorder(x, order), 0) for x in (query, key, value))
    cudnn_lengths = jnp.maximum(lengths, 1)  # a row without valid tokens too has a length of 1
    out = jax.nn.dot_product_attention(
        q, k, v,
        is_causal=True,
        query_seq_lengths=cudnn_lengths,
        key_value_seq_lengths=cudnn_lengths,
        implementation="xla" if interpret else "cudnn",
    )  # fmt: skip
    return _reorder(jnp.where(in_length, out, 0), jnp.argsort(order, axis=1))


def _reorder(x: Array, order: Array) -> Array:
    """Permutes each row's tokens in x (B, T, heads, K); unique indices make the gradient a scatter without adds."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
