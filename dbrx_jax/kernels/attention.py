"""Attention of whole sequences (forward pass, training) and over the key-value cache (prefill and decode in generate).

Each has three implementations: "reference" computes all scores at once; "xla" works in blocks, on every platform;
"flash" runs kernels that keep scores on the chip, on a TPU or a Hopper GPU. There it is the default, and falls back
to "xla" for shapes and dtypes that the kernels do not support.
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

SHORT_SEQUENCE = 1024  # keys; up to these the reference is faster than blocks
FEW_QUERIES = 15  # of a row; kernels that do not support them together take each as a row of its own
SEQUENCE_BLOCK = 512  # queries and keys that are computed together in longer sequences


def select_implementation(implementation: str | None, platform: str) -> str:
    """Returns the name of the implementation to use; None selects the platform's fastest.

    Raises:
      ConfigError: the name is unknown, or the platform has no kernels for "flash".
    """
    if implementation is None:
        return "flash" if kernel_backend(platform) else "xla"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ConfigError(f"attention_implementation: expected one of {names}, got {implementation!r}")
    if implementation == "flash" and kernel_backend(platform) is None:
        needs = "a TPU or a Hopper GPU"
        if platform in GPU_PLATFORMS:
            needs = f"a Hopper GPU and jax {'.'.join(map(str, MIN_JAX_FOR_GPU_KERNELS))}"
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
    """Computes causal attention of a sequence: query t sees the valid keys among 0 … first + t. Has gradients.

    The result is finite but arbitrary for a query that sees no key, or is padding.

    Args:
      valid: False for padding.
      first: position of the first query; not 0 where a device has a later part of the queries.
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
    key: Float[Array, "N G P K"],
    value: Float[Array, "N G P K"],
    positions: Int[Array, "R T"],
    table: Int[Array, "R W"],
    context_shard: tuple[Int[Array, ""] | int, int] = (0, 1),
    platform: str = "cpu",
    scales: tuple[Float[Array, "N G P"], Float[Array, "N G P"]] | None = None,
    implementation: str = "xla",
) -> PartialAttention:
    """Computes attention to a paged cache: a query at position p of row r sees positions 0 … p in the row's blocks.

    The positions of a row must be consecutive. Blocks are read in order, up to the last position that any query
    sees (a single query in plain XLA on a GPU reads all at once), with an online softmax (Milakov and Gimelshein
    2018, arXiv:1805.02867). A block that a query does not see changes none of its bits, so the result depends
    neither on the table's width nor on the other rows' positions.

    Args:
      key, value: pools of N blocks; bfloat16 may come as uint16 on a CPU.
      table: the numbers of each row's blocks.
      context_shard: (x, X) if local position i is position i X + x; (0, 1) if a row's blocks hold all positions.
      platform: a CPU multiplies in float32, others in the query's dtype with float32 sums.
      scales: of the keys and the values of an int8 cache.
      implementation: as :func:`select_implementation` returns it.
    """
    if implementation == "reference":
        return reference_cached_attention(query, key, value, positions, table, context_shard, scales)
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is not None and kernels.cache.supports(query, key, value):
        part = kernels.cache.cache_attention(query, key, value, positions[:, 0], table, context_shard, scales)
        return PartialAttention(*part)
    (R, T), rest = positions.shape, query.shape[2:]
    single = query.reshape(R * T, 1, *rest)
    if kernels is not None and T <= FEW_QUERIES and kernels.cache.supports(single, key, value):
        tables = jnp.repeat(table, T, axis=0)
        part = kernels.cache.cache_attention(single, key, value, positions.reshape(-1), tables, context_shard, scales)
        return PartialAttention(*(x.reshape(R, T, *x.shape[2:]) for x in part))
    return xla_cache.cache_attention(query, key, value, positions, table, context_shard, platform, scales)


def write_and_attend(
    query: Float[Array, "R T H K"],
    new_key: Float[Array, "R T G K"],
    new_value: Float[Array, "R T G K"],
    key: Float[Array, "N G P K"],
    value: Float[Array, "N G P K"],
    positions: Int[Array, "R T"],
    valid: Bool[Array, "R T"],
    table: Int[Array, "R W"],
    platform: str,
    implementation: str,
) -> tuple[PartialAttention, Array, Array] | None:
    """Writes new keys and values to a cache of floats that is not sharded, and attends as :func:`cached_attention`.

    Returns:
      The attention and the updated pools, or None where no kernel does both.
    """
    kernels = attention_kernels(platform) if implementation == "flash" else None
    if kernels is None or not hasattr(kernels.cache, "write_and_attend"):
        return None
    if not (query.shape[1] == 1 and key.dtype == jnp.bfloat16 and kernels.cache.supports(query, key, value)):
        return None
    arguments = query, new_key, new_value, key, value, positions[:, 0], valid[:, 0], table
    part, key, value = kernels.cache.write_and_attend(*arguments)
    return PartialAttention(*part), key, value
