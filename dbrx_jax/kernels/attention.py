"""Attention of whole sequences and through the key-value cache, by the implementation that suits the platform.

Each has three implementations: "reference", the definition with all scores at once; "xla", in blocks; and "flash",
kernels that keep scores on the chip. "flash" uses "xla" for shapes and dtypes that its kernels do not support.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.backend import GPU_PLATFORMS, MIN_JAX_FOR_GPU_KERNELS, kernel_backend
from dbrx_jax.errors import ConfigError
from dbrx_jax.kernels.dispatch import attention_kernels
from dbrx_jax.kernels.xla import cache_attention as xla_cache
from dbrx_jax.kernels.xla.sequence_attention import blockwise_attention
from dbrx_jax.ops.attention import PartialAttention, reference_attention, reference_cached_attention

IMPLEMENTATIONS = ("reference", "xla", "flash")

# Sequences of up to so many tokens are one block, which the definition computes faster.
SHORT_SEQUENCE = 1024
# Queries and keys of a longer one that are computed together.
SEQUENCE_BLOCK = 512


def select_implementation(implementation: str | None, platform: str) -> str:
    """The implementation's name; None is the platform's best.

    Raises:
      ConfigError: there is none of that name, or none for the platform.
    """
    if implementation is None:
        return "flash" if kernel_backend(platform) else "xla"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ConfigError(f"attention_implementation: expected one of {names}, got {implementation!r}")
    if implementation == "flash" and kernel_backend(platform) is None:
        needs = (
            f"a Hopper GPU and jax {'.'.join(map(str, MIN_JAX_FOR_GPU_KERNELS))}"
            if platform in GPU_PLATFORMS
            else "a TPU or GPU"
        )
        raise ConfigError(f'attention_implementation: "flash" needs {needs}; take "xla" or leave it out')
    return implementation


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""] | int = 0,
    implementation: str = "xla",
    platform: str = "cpu",
) -> Float[Array, "B T H K"]:
    """Attention among a sequence's own tokens: query t sees the valid ones of keys 0 … first + t. Has gradients.

    A query that sees nothing, or is padding, gives some finite number.

    Args:
      valid: False for padding.
      first: the place of the first query, on a device that has the later part of the tokens.
      implementation: as :func:`select_implementation` returns it.
    """
    T, S = query.shape[1], key.shape[1]
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is not None and kernels.sequence.supports(query, key, value):
        return kernels.sequence.sequence_attention(query, key, value, valid, jnp.int32(first))
    if implementation == "reference" or S <= SHORT_SEQUENCE:
        visible = (jnp.arange(S) <= first + jnp.arange(T)[:, None]) & valid[:, None, :]
        return reference_attention(query, key, value, visible)
    return blockwise_attention(query, key, value, valid, jnp.int32(first), SEQUENCE_BLOCK)


def cached_attention(
    query: Float[Array, "R T H K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    positions: Int[Array, "R T"],
    first_row: Int[Array, ""] | int,
    block: int,
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    platform: str = "cpu",
    scales: tuple[Float[Array, "B G S"], Float[Array, "B G S"]] | None = None,
    implementation: str = "xla",
) -> PartialAttention:
    """Attention of rows first_row … first_row + R of a cache: a query at position p sees positions 0 … p.

    Several queries of one row must follow one another. The cache is read in blocks of `block` positions, and
    only as far as some query looks (by a single query on a GPU in plain XLA, all at once). Sums are kept as a
    running maximum, normaliser and output (Milakov and Gimelshein 2018, arXiv:1805.02867): a block that a query
    does not see changes none of its bits, so the result does not depend on the cache's length nor on how far
    the other rows have come.

    Args:
      context_shard: (x, X) where the cache holds every X-th position from x on; (0, 1) for all.
      platform: on a CPU products are of float32, elsewhere of the query's dtype with float32 sums.
      scales: of the keys and the values of an int8 cache.
      implementation: as :func:`select_implementation` returns it.
    """
    if implementation == "reference":
        return reference_cached_attention(query, key, value, positions, first_row, context_shard, scales)
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is not None and kernels.cache.supports(query, key, value):
        starts = positions[:, 0]
        return PartialAttention(
            *kernels.cache.cache_attention(query, key, value, starts, first_row, context_shard, scales)
        )
    return xla_cache.cache_attention(query, key, value, positions, first_row, block, context_shard, platform, scales)
