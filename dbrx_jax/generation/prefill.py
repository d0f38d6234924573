"""Runs prompts through the model in chunks of few lengths, and writes their keys and values to blocks of the cache.

A prompt's chunks depend on its own length alone, so few programs are compiled and a row's numbers do not depend on
the others. On a mesh each data-parallel group prefills its own rows.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dbrx_jax.config import DbrxConfig
from dbrx_jax.generation.decode import jit_variants
from dbrx_jax.model.cache import Cache, block_positions, cache_specs, copy_block, create_cache, prefill_chunks
from dbrx_jax.model.graph import ModelState
from dbrx_jax.sharding.partition import BATCH_AXES, Partition


def is_int8(cache: Cache) -> bool:
    return cache[0].key_scale is not None


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config, partition, blocks, dtype):
    """Creates an empty cache of a number of blocks in each group of rows."""
    specs = cache_specs(config, partition, dtype == jnp.int8)
    return partition.shard_map(lambda: create_cache(config, blocks, dtype, partition), (), specs)()


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_hidden(config, partition, rows, dtype):
    """Creates the array for the hidden states of each row's last prompt token, (B, D)."""
    shape = (rows // partition.size(*BATCH_AXES), config.d_model)
    return partition.shard_map(lambda: jnp.zeros(shape, dtype), (), partition.array_spec(BATCH_AXES, None))()


def prefill_chunk(
    model_state: ModelState,
    cache: Cache,
    table: Int[ArrayLike, "R W"],
    tokens: Int[ArrayLike, "R T"],
    spans: Int[ArrayLike, "R 2"],
) -> tuple[Cache, Float[Array, "R D"], Float[Array, "R T D"]]:
    """Runs the model on a chunk of each of R prompts; returns the cache and hidden states of the last and all tokens.

    Args:
      table: the blocks of each row.
      spans: the chunk's first position, a multiple of T or of a block's positions, and its number of tokens: 0 if the
        row has none.
    """
    return prefill_program(model_state)(model_state, cache, table, tokens, spans)


def prefill_program(model_state: ModelState) -> Any:
    """Returns the jitted function of :func:`prefill_chunk`."""
    return _prefill_chunk[model_state.platform == "cpu"]


def _run_prefill_chunk(model_state, cache, table, tokens, spans):
    model = model_state.merge()
    partition = model.partition

    def run(model_state, cache, table, tokens, spans):
        model = model_state.merge()
        start, num_tokens = spans[:, :1], spans[:, 1:]
        offsets = jnp.arange(tokens.shape[1])[None]
        x, cache = model.forward_with_cache(tokens, offsets < num_tokens, start + offsets, cache, table)
        last = jnp.maximum(num_tokens - 1, 0)[..., None]
        return cache, jnp.take_along_axis(x, last, axis=1)[:, 0], x

    cache_spec = cache_specs(model.config, partition, is_int8(cache))
    matrix = partition.array_spec(BATCH_AXES, None)
    in_specs = (model_state.specs(), cache_spec, matrix, matrix, matrix)
    run = partition.shard_map(run, in_specs, (cache_spec, matrix, partition.array_spec(BATCH_AXES, None, None)))
    return run(model_state, cache, table, tokens, spans)


_prefill_chunk = jit_variants(_run_prefill_chunk, donate_argnums=1)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert_hidden(partition, hidden, x, rows):
    """Writes each group's hidden state x (groups, D) to a row (groups, 1) of its part of `hidden` (B, D)."""
    matrix = partition.array_spec(BATCH_AXES, None)

    def run(hidden, x, rows):
        return hidden.at[rows[:, 0]].set(x, mode="drop")

    return partition.shard_map(run, (matrix, matrix, matrix), matrix)(hidden, x, rows)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def copy_blocks(config, partition, cache, pairs):
    """Copies blocks pairs[i, :, 0] of each group i to blocks pairs[i, :, 1], in every layer.

    Args:
      pairs: (groups, n, 2); zeros for padding.
    """
    specs = cache_specs(config, partition, is_int8(cache))

    def run(cache, pairs):
        return lax.fori_loop(
            0, pairs.shape[1], lambda i, cache: copy_block(cache, pairs[0, i, 0], pairs[0, i, 1]), cache
        )

    return partition.shard_map(run, (specs, partition.array_spec(BATCH_AXES, None, None)), specs)(cache, pairs)


def prefill(
    model_state: ModelState,
    config: DbrxConfig,
    partition: Partition,
    rows: Sequence[np.ndarray],
    cache: Cache,
    table: np.ndarray,
    dtype: np.dtype,
) -> tuple[Cache, Array]:
    """Returns a cache with all prompts, and the hidden states (B, D) of their last tokens.

    Equal prompts within a group of rows are computed once, and copied.

    Args:
      model_state, config, partition: of one model.
      rows: token ids of each row; none for padding.
      table: the blocks of each row (B, W).
      dtype: of the hidden states.
    """
    num_groups = partition.size(*BATCH_AXES)
    rows_per_group = len(rows) // num_groups
    hidden = empty_hidden(config, partition, len(rows), dtype)
    jobs = [_distinct_prompts(rows[i * rows_per_group :][:rows_per_group]) for i in range(num_groups)]
    tables = table.reshape(num_groups, rows_per_group, -1)
    for prompts in itertools.zip_longest(*jobs, fillvalue=(np.zeros(0, np.int32), [])):
        plans = [prefill_chunks(len(ids), partition) for ids, _ in prompts]
        chunk_tables = np.stack(
            [t[targets[0] if targets else 0] for t, (_, targets) in zip(tables, prompts, strict=True)]
        )
        for chunks in itertools.zip_longest(*plans, fillvalue=(0, 0)):
            # Groups with a chunk of another length wait.
            for length in sorted({n for _, n in chunks if n}):
                parts = [
                    ids[start : start + n] if n == length else ids[:0]
                    for (ids, _), (start, n) in zip(prompts, chunks, strict=True)
                ]
                tokens = np.stack([np.pad(part, (0, length - len(part))) for part in parts])
                starts = [start if len(part) else 0 for part, (start, _) in zip(parts, chunks, strict=True)]
                spans = np.array([[start, len(part)] for start, part in zip(starts, parts, strict=True)], np.int32)
                cache, x, _ = prefill_chunk(model_state, cache, chunk_tables, tokens, spans)
                is_last = [
                    start + len(part) == len(ids) for start, part, (ids, _) in zip(starts, parts, prompts, strict=True)
                ]
                targets = [
                    t if len(part) and last else [] for part, last, (_, t) in zip(parts, is_last, prompts, strict=True)
                ]
                for target in itertools.zip_longest(*targets):
                    row = [[rows_per_group if t is None else t] for t in target]
                    hidden = insert_hidden(partition, hidden, x, np.array(row, np.int32))
        for pairs in _copies(prompts, tables, block_positions(partition)):
            cache = copy_blocks(config, partition, cache, pairs)
    return cache, hidden


def _distinct_prompts(rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, list[int]]]:
    """Returns the distinct prompts of a group with the rows that have them."""
    targets: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for row, ids in enumerate(rows):
        if len(ids):
            targets.setdefault(ids.tobytes(), (ids, []))[1].append(row)
    return list(targets.values())


def _copies(prompts: Sequence[Any], tables: np.ndarray, block: int) -> list[np.ndarray]:
    """Returns the pairs of blocks that copy each group's prompt from its first row to one of its others at a time."""
    copies = []
    for others in itertools.zip_longest(*(targets[1:] for _, targets in prompts)):
        pairs = np.zeros((len(prompts), tables.shape[2], 2), np.int32)
        for group, (other, (ids, targets)) in enumerate(zip(others, prompts, strict=True)):
            if other is not None:
                used = -(-len(ids) // block)
                pairs[group, :used] = np.stack([tables[group, targets[0]], tables[group, other]], axis=1)[:used]
        copies.append(pairs)
    return copies
