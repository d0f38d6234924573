"""Lowers the programs of a generation ahead of time, for compiling in parallel or without devices."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbrx_jax.generation import decode, prefill
from dbrx_jax.generation.state import Options, Settings, start_rows, state_specs
from dbrx_jax.model.cache import block_positions, cache_specs, prefill_chunk_lengths
from dbrx_jax.model.graph import ModelState
from dbrx_jax.sharding.partition import BATCH_AXES


def lower(
    model_state: ModelState,
    settings: Settings,
    options: Options,
    rows: int,
    positions: int,
    cache_dtype: np.dtype,
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields each program of a generation with its name, lowered for the devices of the model's mesh when it is needed.

    Programs that take longest to compile come first.

    Args:
      model_state, settings: arrays, or shapes without memory.
      rows, positions: size of the cache.
      lengths: of the prompts' chunks; by default the longest alone.
    """
    model = model_state.merge()
    config, partition = model.config, model.partition
    groups = partition.size(*BATCH_AXES)
    width = positions // block_positions(partition)
    blocks = rows // groups * width + 1

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    model_state = partition.abstract(model_state, model_state.specs()) if partition.mesh else model_state
    cache = jax.eval_shape(partial(prefill.empty_cache, config, partition, blocks, cache_dtype))
    cache = partition.abstract(cache, cache_specs(config, partition, cache_dtype == np.int8))
    matrix = partition.array_spec(BATCH_AXES, None)
    hidden, x = (
        partition.abstract(jax.ShapeDtypeStruct((n, config.d_model), model.dtype), matrix) for n in (rows, groups)
    )
    prompts = (int32(rows, positions), int32(rows), int32(rows))
    state = jax.eval_shape(partial(start_rows, config, partition, options), settings, *prompts)
    state = partition.abstract(state, state_specs(settings, options, partition).state)
    arguments = model_state, options, settings
    decode_program, sample_program = (f(model_state, options) for f in (decode.decode_program, decode.sample_program))
    yield "decode", decode_program.lower(*arguments, cache, state, int32(rows), int32(rows, width), int32())
    lengths = prefill_chunk_lengths(partition)[-1:] if lengths is None else lengths
    for length in lengths:
        chunk = int32(groups, width), int32(groups, length), int32(groups, 2)
        yield (f"prefill {length}", prefill.prefill_program(model_state).lower(model_state, cache, *chunk))
    yield "sample_first", sample_program.lower(*arguments, state, int32(rows), hidden, int32(rows))
    yield "start_rows", start_rows.lower(config, partition, options, settings, *prompts)
    yield "insert_hidden", prefill.insert_hidden.lower(partition, hidden, x, int32(groups, 1))
    yield "empty_cache", prefill.empty_cache.lower(config, partition, blocks, cache_dtype)
    yield "empty_hidden", prefill.empty_hidden.lower(config, partition, rows, model.dtype)
