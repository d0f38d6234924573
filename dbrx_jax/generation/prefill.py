"""Runs prompts through the model, one at a time in each group of rows, in chunks of few lengths without padding.

A prompt's chunks depend on its own length alone, so few programs are compiled and a row's numbers do not depend on
the others. On a mesh each data-parallel group prefills its own rows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from dbrx_jax.config import DbrxConfig
from dbrx_jax.generation.decode import empty_cache, empty_logits, insert_chunk, prefill_chunk
from dbrx_jax.model.cache import Cache, prefill_chunks
from dbrx_jax.model.graph import ModelState
from dbrx_jax.sharding.partition import BATCH_AXES, Partition


def prefill(
    model_state: ModelState,
    config: DbrxConfig,
    partition: Partition,
    rows: Sequence[np.ndarray],
    positions: int,
    cache_dtype: np.dtype,
) -> tuple[Cache, Array]:
    """Returns a cache with all prompts, and the logits (B, V) of their last tokens.

    Equal prompts within a group of rows are computed once.

    Args:
      model_state, config, partition: of one model.
      rows: token ids of each row; none for padding.
      positions: of the cache.
    """
    num_groups = partition.size(*BATCH_AXES)
    rows_per_group = len(rows) // num_groups
    cache = empty_cache(config, partition, len(rows), positions, cache_dtype)
    logits = empty_logits(config, partition, len(rows))
    row_cache = empty_cache(config, partition, num_groups, positions, cache_dtype)
    jobs = [_distinct_prompts(rows[i * rows_per_group :][:rows_per_group]) for i in range(num_groups)]
    for prompts in itertools.zip_longest(*jobs, fillvalue=(np.zeros(0, np.int32), [])):
        plans = [prefill_chunks(len(ids), partition) for ids, _ in prompts]
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
                row_cache, row_logits = prefill_chunk(model_state, row_cache, tokens, spans)
                targets = [targets if len(part) else [] for part, (_, targets) in zip(parts, prompts, strict=True)]
                for target in _target_spans(targets, starts):
                    arrays = (cache, logits, row_cache, row_logits, target)
                    cache, logits = insert_chunk(config, partition, length, *arrays)
    return cache, logits


def _distinct_prompts(rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, list[int]]]:
    """Returns the distinct prompts of a group with the rows that have them."""
    targets: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for row, ids in enumerate(rows):
        if len(ids):
            targets.setdefault(ids.tobytes(), (ids, []))[1].append(row)
    return list(targets.values())


def _target_spans(targets: list[list[int]], starts: list[int]) -> list[Any]:
    """Returns the last argument of each call of :func:`insert_chunk`, a row in each group at a time."""
    spans = []
    for rows in itertools.zip_longest(*targets):
        spans.append([[0, 0, 0] if row is None else [row, start, 1] for row, start in zip(rows, starts, strict=True)])
    return [np.array(span, np.int32) for span in spans]
