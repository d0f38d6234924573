"""A step's keys or values into the cache on a TPU, where they belong and nowhere else.

XLA's scatter brings a whole layer's cache to VMEM and back, where it fits there. This is one copy from HBM to HBM
for each row.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int, Shaped

NAME = "write_positions"


def write_positions(
    cache: Shaped[Array, "B S G K"], new: Shaped[Array, "R G K"], rows: Int[Array, "R"], places: Int[Array, "R"]
) -> Shaped[Array, "B S G K"]:
    """The cache, in its own memory where it is donated, with new[r] at [rows[r], places[r]]; not where that is S."""
    count, end = new.shape[0], cache.shape[1]

    def body(rows, places, new, _, cache, done):
        def each(act):
            def one(r, carry):
                copy = pltpu.make_async_copy(new.at[r], cache.at[rows[r], places[r]], done)
                pl.when(places[r] < end)(lambda: act(copy))
                return carry

            lax.fori_loop(0, count, one, 0)

        each(lambda copy: copy.start())
        each(lambda copy: copy.wait())

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        name=NAME,
    )(rows.astype(jnp.int32), places.astype(jnp.int32), new, cache)
