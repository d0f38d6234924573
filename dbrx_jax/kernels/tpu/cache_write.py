"""Writes a decode step's keys or values to the cache in place on a TPU: one copy from HBM to HBM for each row.

XLA's scatter copies a whole layer's cache to VMEM and back if it fits.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int, Shaped

NAME = "write_positions"


def write_positions(
    cache: Shaped[Array, "B S G K"], new: Shaped[Array, "R G K"], rows: Int[Array, "R"], positions: Int[Array, "R"]
) -> Shaped[Array, "B S G K"]:
    """Writes new[r] to cache[rows[r], positions[r]], unless positions[r] is S; in place if the cache is donated."""
    num_rows, num_positions = new.shape[0], cache.shape[1]

    def body(rows, positions, new, _, cache, semaphore):
        def for_each_copy(start_or_wait):
            def process_row(r, carry):
                copy = pltpu.make_async_copy(new.at[r], cache.at[rows[r], positions[r]], semaphore)
                pl.when(positions[r] < num_positions)(lambda: start_or_wait(copy))
                return carry

            lax.fori_loop(0, num_rows, process_row, 0)

        for_each_copy(lambda copy: copy.start())
        for_each_copy(lambda copy: copy.wait())

    hbm_spec = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm_spec, hbm_spec],
            out_specs=hbm_spec,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        name=NAME,
    )(rows.astype(jnp.int32), positions.astype(jnp.int32), new, cache)
