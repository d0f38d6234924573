"""Compiles the engine's programs before the first request, and times them to know how long prompts may hold up rows."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dbrx_jax.engine.programs import COPIES, MASKS, Programs
from dbrx_jax.engine.prompt_scores import score_program
from dbrx_jax.engine.scheduler import MAX_SEGMENTS, Limits
from dbrx_jax.engine.slots import VECTORS, SlotRow, SlotStart, make_row
from dbrx_jax.generation.decode import decode_program, sample_program
from dbrx_jax.generation.prefill import prefill_program
from dbrx_jax.generation.sampling import row_keys
from dbrx_jax.generation.verify import verify_program
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.causal_lm import CausalLM

SLOWDOWN = 4  # a step with prompts may take this many times as long as one without
# A chunk that takes at most so many times as long as the shortest is always allowed: both mostly read the weights.
SHORT = 1.25
TRIALS = 3


def compile_programs(model: CausalLM, programs: Programs, limits: Limits) -> None:
    """Compiles the programs, several at a time, and runs each on padding, which changes nothing.

    For a known load these are its shapes alone; what options of few rows need is compiled when it is needed.
    """
    if limits.shapes is None:
        _write_padding(model, programs)
    else:
        _write_row(programs, _make_row(model, 0))
    with ThreadPoolExecutor() as pool:
        # Traced one by one; a later call finds the compiled program.
        compiling = [pool.submit(program.lower(*arguments).compile) for program, arguments in _calls(programs, limits)]
        for one in compiling:
            one.result()
    for num_rows, length in limits.chunk_shapes:
        table, tokens, spans = _chunk(programs, limits, num_rows, length)
        programs.prefill(table, tokens, spans)
        if num_rows == 1 and limits.shapes is None:
            programs.score(tokens)
    for size in limits.first_sizes:
        programs.sample_first(np.full(size, programs.num_slots, np.int32), np.zeros(size, np.int32))
    for size in limits.row_buckets:
        slots, table = _rows(programs, limits, size)
        padding = np.full_like(slots, programs.num_slots)
        programs.decode(padding, table, 1)
        if limits.speculation:
            programs.verify(padding, table, *_proposals(limits, size))


def _calls(programs: Programs, limits: Limits) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields the large programs with arguments, those that take longest to compile first."""
    model = programs.model_state
    for size in reversed(limits.row_buckets):
        rows = programs.settings, programs.cache, programs.state, *_rows(programs, limits, size), np.int32(1)
        yield decode_program(model, programs.options), (model, programs.options, *rows)
        if limits.speculation:
            arrays = *rows[:-1], *_proposals(limits, size)
            yield verify_program(model, programs.options), (model, programs.options, *arrays)
    for shape in reversed(limits.chunk_shapes):
        yield prefill_program(model), (model, programs.cache, *_chunk(programs, limits, *shape))
    longest = _chunk(programs, limits, *limits.chunk_shapes[-1])
    _, last, x = jax.eval_shape(prefill_program(model), model, programs.cache, *longest)
    last = jax.ShapeDtypeStruct((MAX_SEGMENTS, last.shape[1]), last.dtype, sharding=programs.replicated)
    for size in limits.first_sizes:
        slots = np.zeros(size, np.int32)
        first = programs.settings, programs.state, slots, last, slots
        yield sample_program(model, programs.first_options), (model, programs.first_options, *first)
    if limits.shapes is not None:
        return
    for length in (n for count, n in limits.chunk_shapes if count == 1):
        hidden = jax.ShapeDtypeStruct((1, length, x.shape[2]), x.dtype)
        yield score_program(model), (model, programs.options.top_logprobs, hidden, np.zeros((1, length), np.int32))


def _rows(programs: Programs, limits: Limits, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first slots, and a table of block 1 alone."""
    slots = np.minimum(np.arange(size, dtype=np.int32), programs.num_slots)
    return slots, np.ones((size, programs.positions // limits.block), np.int32)


def _proposals(limits: Limits, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns proposals of token 0, as many as there can be."""
    return np.zeros((size, limits.speculation), np.int32), np.full(size, limits.speculation, np.int32)


def _chunk(programs: Programs, limits: Limits, num_rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Returns table, tokens and spans of a chunk of padding."""
    shapes = (num_rows, programs.positions // limits.block), (num_rows, length), (num_rows, 2)
    return tuple(np.zeros(shape, np.int32) for shape in shapes)


def _write_padding(model: CausalLM, programs: Programs) -> None:
    """Runs the small programs."""
    vocabulary = model.partition.pad_vocabulary(model.config.vocab_size)
    row = _make_row(model, 0)._replace(vectors=dict.fromkeys(VECTORS, np.zeros((1, vocabulary), np.float32)))
    _write_row(programs, row)
    programs.copy(np.zeros((1, COPIES, 2), np.int32))
    slots = np.full(MASKS, programs.num_slots, np.int32)
    programs.write_masks(slots, np.zeros((MASKS, programs.mask_width), np.uint32))


def _write_row(programs: Programs, row: SlotRow) -> None:
    """Writes a row that is done."""
    programs.write_row(row, np.zeros(programs.positions, np.int32), np.array(SlotStart(0, 1, 0, 0), np.int32))


def _make_row(model: CausalLM, seed: int) -> SlotRow:
    key = np.asarray(row_keys(np.array([seed], np.uint32), np.zeros(1, np.uint32)))[0]
    config = GenerationConfig(do_sample=True)
    return make_row(config, model.config.vocab_size, 1, 1, key, False, False, model.partition)


def measure_budgets(model: CausalLM, programs: Programs, limits: Limits) -> tuple[int, ...]:
    """Returns the most prompt tokens of a step beside the rows of each bucket.

    With them a step takes at most SLOWDOWN times as long as without, or a chunk at most SHORT times as long as the
    shortest. Rows of random tokens are timed, as equal ones would need the same experts. Leaves arbitrary contents in
    block 1 and in the slots.
    """
    rng = np.random.default_rng(0)
    lengths = [n for count, n in limits.chunk_shapes if count == 1]
    chunk_seconds = {}
    for length in lengths:
        table, _, _ = _chunk(programs, limits, 1, length)
        tokens = rng.integers(model.config.vocab_size, size=(1, length), dtype=np.int32)

        def prefill(table=table + 1, tokens=tokens, length=length) -> None:
            programs.prefill(table, tokens, np.array([[0, length]], np.int32))
            jax.block_until_ready(programs.last)

        chunk_seconds[length] = _seconds(prefill)
    _start_rows(model, programs, limits)
    budgets = []
    for size in limits.row_buckets:
        slots, table = _rows(programs, limits, size)

        def decode(slots=slots, table=table) -> None:
            jax.block_until_ready(programs.decode(slots, table, 1))

        most = max((SLOWDOWN - 1) * _seconds(decode), SHORT * chunk_seconds[lengths[0]])
        budgets.append(max(n for n in lengths if chunk_seconds[n] <= most))
    return tuple(budgets)


def measure_verify_costs(model: CausalLM, programs: Programs, limits: Limits) -> dict[int, float]:
    """Returns for the rows of each bucket how many times as long as decoding them it takes to verify proposals.

    All rows have as many proposals as there can be. Leaves arbitrary contents in block 1 and in the slots.
    """
    rng, costs = np.random.default_rng(0), {}
    _start_rows(model, programs, limits)
    for size in limits.row_buckets:
        slots, table = _rows(programs, limits, size)
        tokens, counts = _proposals(limits, size)
        tokens = rng.integers(model.config.vocab_size, size=tokens.shape, dtype=np.int32)

        def decode(slots=slots, table=table) -> None:
            jax.block_until_ready(programs.decode(slots, table, 1))

        def verify(slots=slots, table=table, tokens=tokens, counts=counts) -> None:
            jax.block_until_ready(programs.verify(slots, table, tokens, counts))

        costs[size] = _seconds(verify) / _seconds(decode)
    return costs


def _start_rows(model: CausalLM, programs: Programs, limits: Limits) -> None:
    """Puts a row in each slot, and samples its first token."""
    for slot in range(programs.num_slots):
        start = SlotStart(slot, 1, 0, programs.positions)
        programs.write_row(_make_row(model, slot), np.zeros(programs.positions, np.int32), np.array(start, np.int32))
    size = limits.first_buckets[-1]
    for begin in range(0, programs.num_slots, size):
        slots = np.minimum(np.arange(begin, begin + size, dtype=np.int32), programs.num_slots)
        programs.sample_first(slots, np.zeros(size, np.int32))


def _seconds(run: Callable[[], None]) -> float:
    """Returns the least time of a few calls."""
    times = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
