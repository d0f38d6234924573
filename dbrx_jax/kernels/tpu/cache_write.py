"""Writes a decode step's keys, values and scales to the paged cache in place on a TPU, with copies for each row.

XLA's scatter copies a whole layer's cache to VMEM and back if it fits, and the scales to another layout and back.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from dbrx_jax.kernels.tpu.packed_weights import iota


def write_positions(
    pool: Shaped[Array, "N P G K"], new: Shaped[Array, "R G K"], blocks: Int[Array, "R"], offsets: Int[Array, "R"]
) -> Shaped[Array, "N P G K"]:
    """Writes new[r] to pool[blocks[r], offsets[r]], unless offsets[r] is P; in place if the pool is donated."""

    def body(blocks, offsets, new, _, pool, semaphore):
        def copy(r):
            return pltpu.make_async_copy(new.at[r], pool.at[blocks[r], offsets[r]], semaphore)

        _for_each_row(offsets, pool.shape[1], lambda r: copy(r).start())
        _for_each_row(offsets, pool.shape[1], lambda r: copy(r).wait())

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return _call("write_positions", body, hbm, [pltpu.SemaphoreType.DMA], blocks, offsets, new, pool)


def write_scales(
    pool: Float[Array, "N G P"], new: Float[Array, "R G"], blocks: Int[Array, "R"], offsets: Int[Array, "R"]
) -> Float[Array, "N G P"]:
    """Writes new[r] to pool[blocks[r], :, offsets[r]], unless offsets[r] is P; in place if the pool is donated.

    A copy cannot write single elements of a tile in HBM. So this reads each row's block and writes it back, and no two
    rows that write may have the same block.
    """
    block_shape = (new.shape[0], *pool.shape[1:])

    def body(blocks, offsets, new, _, pool, buffer, semaphores):
        def read(r):
            return pltpu.make_async_copy(pool.at[blocks[r]], buffer.at[r], semaphores.at[0])

        def write(r):
            return pltpu.make_async_copy(buffer.at[r], pool.at[blocks[r]], semaphores.at[1])

        def change(r):
            is_new = iota(block_shape[1:], 1) == offsets[r]
            scales = jnp.where(is_new, new[r].astype(jnp.float32), buffer[r].astype(jnp.float32))
            buffer[r] = scales.astype(buffer.dtype)
            write(r).start()

        for action in (lambda r: read(r).start(), lambda r: read(r).wait(), change, lambda r: write(r).wait()):
            _for_each_row(offsets, block_shape[2], action)

    # Broadcast here, as a row of G elements is not a column in VMEM.
    new = jnp.broadcast_to(new[:, :, None], block_shape).astype(pool.dtype)
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    scratch = [pltpu.VMEM(block_shape, pool.dtype), pltpu.SemaphoreType.DMA((2,))]
    return _call("write_scales", body, vmem, scratch, blocks, offsets, new, pool)


def _for_each_row(offsets: Any, num_positions: int, action: Callable[[Any], None]) -> None:
    """Runs an action for each row whose offset is in its block."""

    def process_row(r, carry):
        pl.when(offsets[r] < num_positions)(lambda: action(r))
        return carry

    lax.fori_loop(0, offsets.shape[0], process_row, 0)


def _call(name, body, new_spec, scratch, blocks, offsets, new, pool) -> Array:
    """Calls a kernel that changes the pool."""
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=pltpu.HBM(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(1,), in_specs=[new_spec, hbm], out_specs=hbm, scratch_shapes=scratch
        ),
        input_output_aliases={3: 0},
        name=name,
    )(blocks.astype(jnp.int32), offsets.astype(jnp.int32), new, pool)
