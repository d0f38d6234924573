"""Sizes the engine's cache."""

import numpy as np

from dbrx_jax.engine.scheduler import Limits
from dbrx_jax.errors import GenerationError, MemoryLimitError
from dbrx_jax.generation.processes import least_on_all_processes
from dbrx_jax.host_memory import available_memory
from dbrx_jax.model.cache import CACHE_BLOCK
from dbrx_jax.model.causal_lm import CausalLM

SHARE = 0.9  # of a device's memory that the engine takes, weights included
CPU_SHARE = 0.25  # of the host's free memory
SCALE_BYTES = 2


def block_bytes(model: CausalLM, dtype: np.dtype) -> int:
    """Returns the bytes of one block of the cache on one device."""
    config, partition = model.config, model.partition
    element = config.head_dim + SCALE_BYTES if dtype == np.int8 else config.head_dim * dtype.itemsize
    return 2 * config.n_layers * config.kv_n_heads // partition.size("tensor") * CACHE_BLOCK * element


def blocks_for(model: CausalLM, limits: Limits, dtype: np.dtype, cache_gb: float | None) -> int:
    """Returns the number of blocks of the cache, with the spare one: what a size in GB, or the free memory, holds.

    There are never more than all rows can fill. Of several processes, the one with the least memory decides.

    Raises:
      MemoryLimitError: not one row of a block fits.
    """
    most = limits.max_rows * -(-limits.positions // limits.block) + 1
    size = block_bytes(model, dtype)
    if cache_gb is not None and not (np.isfinite(cache_gb) and cache_gb > 0):
        raise GenerationError(f"cache_gb: expected a number above 0, got {cache_gb!r:.40}")
    available = _free_bytes(model) if cache_gb is None else cache_gb * 1e9
    blocks = least_on_all_processes(model.partition, min(most, int(available / size)))
    if blocks < 2:
        raise MemoryLimitError(
            f"cache: {available / 1e9:.3f} GB hold {blocks} blocks of {size / 1e9:.3f} GB; it needs two at least"
        )
    return blocks


def _free_bytes(model: CausalLM) -> float:
    """Returns the bytes that the cache may take on each device."""
    device = model.partition.mesh.local_devices[0] if model.partition.mesh is not None else None
    import jax

    stats = (device or jax.local_devices()[0]).memory_stats()
    if stats and "bytes_limit" in stats:
        return max(0.0, SHARE * stats["bytes_limit"] - stats["bytes_in_use"])
    return CPU_SHARE * (available_memory() or 0)
