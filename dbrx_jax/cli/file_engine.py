"""Opens the engine for generate --file, as large as the file needs it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from dbrx_jax.cli.file_run import FileRun
from dbrx_jax.console import print_status
from dbrx_jax.errors import MemoryLimitError

if TYPE_CHECKING:
    from dbrx_jax.engine.engine import Engine
    from dbrx_jax.engine.scheduler import Shapes
    from dbrx_jax.planning.memory_check import Request

STEP_SECONDS = 1.0  # that Ctrl-C waits for the step that runs
FEW = 4  # batches: so few items are not worth compiling programs that compute several prompts at once


@contextlib.contextmanager
def open_engine(run: FileRun) -> Iterator["Engine"]:
    """Opens an engine whose cache holds all rows with the longest prompt, or what the memory allows.

    Raises:
      MemoryLimitError: not even the longest prompt fits.
    """
    from dbrx_jax.engine.engine import Engine

    engine = Engine(
        run.model,
        run.checkpoint.tokenizer,
        max_rows=run.rows,
        cache_gb=_cache_gb(run),
        max_waiting=2 * run.rows,
        max_length=_positions(run),
        top_logprobs=0,
        shapes=_shapes(run),
        **run.command.cache_arguments(),
    )
    seconds, is_complete = None, False
    try:
        _check_cache(run, engine)
        run.rates.start()
        yield engine
        is_complete = True
    except (KeyboardInterrupt, GeneratorExit):  # the latter if Ctrl-C came while results were written
        seconds = STEP_SECONDS
        raise
    finally:
        engine.close(step_seconds=seconds, is_complete=is_complete)


def follow_first_process(run: FileRun) -> None:
    """Runs the steps of the engine of the first process, until that has all results.

    Raises:
      LostProcessError: the first process ended before.
      MemoryLimitError: as :func:`open_engine`.
    """
    with report_memory(run), open_engine(run) as engine:
        engine.follow(passes_signals=False)


def _check_cache(run: FileRun, engine: "Engine") -> None:
    """Checks that the longest prompt fits the cache, and reports if not all rows could have such prompts."""
    tokens = engine.stats().blocks * engine.limits.block
    longest = run.survey.positions
    if tokens < longest:
        raise MemoryLimitError(
            f"memory: the cache that fits holds {tokens} tokens, and a row has up to {longest}; "
            "give fewer new tokens, or --cache-dtype int8"
        )
    if tokens < run.rows * longest:
        print_status(f"The cache holds {tokens:,} tokens: not all of {run.rows} rows of up to {longest:,} run at once")


def _positions(run: FileRun) -> int:
    """Returns the positions of a row: one of few numbers, so that files share compiled programs."""
    from dbrx_jax.model.cache import cache_capacity

    return min(cache_capacity(run.survey.positions, run.model.partition), run.model.config.max_seq_len)


def _cache_gb(run: FileRun) -> float | None:
    """Returns the size of a cache for all rows with the longest prompt, in GB; None if it does not fit the memory.

    Of several processes, all must have the memory.
    """
    import numpy as np

    from dbrx_jax.engine.memory import block_bytes
    from dbrx_jax.generation.processes import least_on_all_processes
    from dbrx_jax.model.cache import block_positions
    from dbrx_jax.planning.memory_check import check_memory

    fits = True
    try:
        check_memory(_request(run), weights_loaded=True)
    except MemoryLimitError:
        fits = False
    if not least_on_all_processes(run.model.partition, fits):
        return None
    width = -(-_positions(run) // block_positions(run.model.partition))
    blocks = run.rows * width + 1
    dtype = run.model.dtype if run.command.cache_dtype is None else np.dtype(run.command.cache_dtype)
    return (blocks + 0.5) * block_bytes(run.model, dtype) / 1e9


def _shapes(run: FileRun) -> "Shapes":
    """Returns the sizes of programs that the prompts need."""
    from dbrx_jax.engine.scheduler import MAX_SEGMENTS, Shapes
    from dbrx_jax.model.cache import prefill_chunks, round_up_size
    from dbrx_jax.ops.row_tiles import ROW_TILE

    partition, invariant = run.model.partition, run.command.batch_invariant
    chunks = [chunk for length in run.survey.lengths for chunk in prefill_chunks(length, partition)]
    lengths = sorted({length for _, length in chunks})
    rows = round_up_size(run.rows)
    if invariant:
        return Shapes((-(-rows // ROW_TILE) * ROW_TILE,), tuple((1, n) for n in lengths), (ROW_TILE,))
    is_small = run.survey.num_items <= FEW * run.rows
    counts = (1,) if is_small else (1, 4, MAX_SEGMENTS)
    shapes = tuple((count, n) for n in lengths for count in counts if count == 1 or count * n <= lengths[-1])
    return Shapes((rows,), shapes, (1,) if is_small else (1, MAX_SEGMENTS))


def report_memory(run: FileRun) -> AbstractContextManager[None]:
    """Reports memory that runs out in a `with` block with what would fit."""
    from dbrx_jax.planning.memory_check import report_generation_memory

    return report_generation_memory(_request(run))


def _request(run: FileRun) -> "Request":
    """Returns what is in memory if all rows have the longest prompt."""
    from jax.sharding import Mesh

    from dbrx_jax.planning.memory_check import Request

    model, cache = run.model, (run.rows, _positions(run), run.command.cache_dtype)
    mesh = model.partition.mesh if isinstance(model.partition.mesh, Mesh) else None
    return Request(model.config, mesh, model.dtype, model.quantization, *cache)
