"""The engine's arrays on the devices, and the programs that run its steps."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dbrx_jax.engine.prompt_scores import score_chunk, score_program
from dbrx_jax.engine.rows import Row
from dbrx_jax.engine.scheduler import Limits, Step, table_of
from dbrx_jax.engine.slots import VECTORS, SlotStart, empty_slots, make_row, write_masks, write_slot, write_vector
from dbrx_jax.generation.decode import decode, decode_program, sample_first
from dbrx_jax.generation.prefill import copy_blocks, empty_cache, prefill_chunk, prefill_program
from dbrx_jax.generation.processes import replicate
from dbrx_jax.generation.state import Options, Outputs
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model

COPIES = 16  # blocks that one program copies
MASKS = 8  # rows whose masks one program writes


class Results(NamedTuple):
    """New tokens of rows, still on the devices."""

    rows: list[Row]
    steps: int  # that each row was promised
    outputs: Outputs

    def fetch(self) -> Any:
        """Waits for the tokens; returns the Outputs as numpy arrays."""
        return jax.tree.map(np.asarray, self.outputs)


class PromptScores(NamedTuple):
    """Log-probabilities of what follows the tokens of a row's chunk, still on the devices."""

    row: Row
    start: int  # position of the first
    num_tokens: int
    logprobs: Any  # (T,)
    top_ids: Any  # (T, n)
    top_logprobs: Any


class Device:
    """Cache, settings and state of an engine's rows.

    Args:
      num_blocks: of the cache, with the spare one.
      top_logprobs: most probable tokens that a row may ask for.
    """

    def __init__(self, model: CausalLM, limits: Limits, num_blocks: int, cache_dtype: np.dtype, top_logprobs: int):
        self._model_state, self._config, self._partition = split_model(model), model.config, model.partition
        self._limits = limits
        self._width = -(-limits.positions // limits.block)
        self._first_options = Options(batch_invariant=limits.batch_invariant, top_logprobs=top_logprobs)
        self._options = self._first_options._replace(steps=limits.steps)
        self._cache = empty_cache(self._config, self._partition, num_blocks, cache_dtype)
        slots, positions = limits.max_rows, self._width * limits.block
        self._settings, self._state = empty_slots(self._config, self._partition, self._options, slots, positions)
        self._positions = positions

    def run(self, step: Step) -> list[Results | PromptScores]:
        """Starts a step; returns what it will compute, in order."""
        results: list[Results | PromptScores] = []
        if step.prefill is not None:
            x, scores = self._prefill(step)
            results += scores
            self.copy(step.copies)
            for row, _ in step.started:
                self._write(row)
            num_rows = step.prefill.shape[0]
            size = max(num_rows, self._first_bucket(len(step.started), num_rows))
            self._write_masks([row for row, _ in step.started if row.matcher is not None])
            for i in range(0, len(step.started), size):
                results.append(self._sample_first(step.started[i : i + size], size, x))
        self._write_masks([row for row in step.decode if row.matcher is not None])
        if step.decode:
            results.append(self._decode(step))
        return results

    def _first_bucket(self, num_started: int, num_rows: int) -> int:
        """Returns the number of rows of a program that samples first tokens."""
        smallest = 8 if self._limits.batch_invariant else 1
        return max(smallest, 16 if num_started > max(smallest, num_rows) else num_rows)

    def _prefill(self, step: Step) -> tuple[Any, list[PromptScores]]:
        """Starts a step's chunks; returns the hidden states of their last tokens, and the scores that are wanted."""
        assert step.prefill is not None
        rows, starts, counts, (num_rows, length) = step.prefill
        tokens, spans = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, 2), np.int32)
        for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            tokens[i, :count] = row.sequence[start : start + count]
            spans[i] = start, count
        table = table_of(rows, num_rows, self._width)
        if rows[0].job.is_scored:
            following = rows[0].sequence[starts[0] + 1 :][: counts[0]]
            targets = np.pad(following, (0, length - len(following)))[None].astype(np.int32)
            arrays = table, tokens, targets, spans
            number = self._options.top_logprobs
            self._cache, x, *scores = score_chunk(self._model_state, number, self._cache, *arrays)
            return x, [PromptScores(rows[0], starts[0], counts[0], *scores)]
        self._cache, x = prefill_chunk(self._model_state, self._cache, table, tokens, spans)
        return x, []

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks to others; from block 0, which is zero, to clear them."""
        for i in range(0, len(pairs), COPIES):
            some = pairs[i : i + COPIES]
            array = np.zeros((1, COPIES, 2), np.int32)
            array[0, : len(some)] = some
            self._cache = copy_blocks(self._config, self._partition, self._cache, array)

    def _write(self, row: Row) -> None:
        """Puts a row in its slot, before its next token."""
        start = SlotStart(row.slot, len(row.sequence), row.generated, row.job.limit)
        tokens = np.pad(row.sequence, (0, self._positions - len(row.sequence)))
        self._write_arrays(row.settings, tokens, start)

    def _write_arrays(self, settings: Any, tokens: np.ndarray, start: SlotStart) -> None:
        numbers = np.array(start, np.int32)
        arrays = self._settings, self._state, settings.settings, tokens, numbers
        self._settings, self._state = write_slot(self._partition, *arrays)
        for name, vector in settings.vectors.items():
            self._settings = write_vector(self._partition, name, self._settings, numbers[0], vector)

    def _write_masks(self, rows: Sequence[Row]) -> None:
        """Writes the masks of rows whose next token is constrained."""
        for i in range(0, len(rows), MASKS):
            some = rows[i : i + MASKS]
            masks = np.stack([row.matcher.mask() for row in some if row.matcher is not None])
            self._write_mask_arrays([row.slot for row in some], masks)

    def _write_mask_arrays(self, slots: Sequence[int], masks: np.ndarray) -> None:
        width = -(-self._partition.pad_vocabulary(self._config.vocab_size) // 32)
        padded = np.zeros((MASKS, width), np.uint32)
        padded[: len(masks), : masks.shape[1]] = masks
        numbers = np.array([*slots, *[self._limits.max_rows] * (MASKS - len(slots))], np.int32)
        self._settings = write_masks(self._partition, self._settings, numbers, padded)

    def _sample_first(self, started: Sequence[tuple[Row, int]], size: int, x: Any) -> Results:
        slots, index = np.full(size, self._limits.max_rows, np.int32), np.zeros(size, np.int32)
        for i, (row, segment) in enumerate(started):
            slots[i], index[i] = row.slot, segment
        arguments = self._model_state, self._first_options, self._settings, self._state, slots, x, index
        self._state, outputs = sample_first(*arguments)
        return Results([row for row, _ in started], 1, self._readable(outputs))

    def _decode(self, step: Step) -> Results:
        size = next(b for b in self._limits.row_buckets if b >= len(step.decode))
        slots = np.full(size, self._limits.max_rows, np.int32)
        slots[: len(step.decode)] = [row.slot for row in step.decode]
        outputs = self._run_decode(slots, table_of(step.decode, size, self._width), step.steps)
        return Results(list(step.decode), step.steps, self._readable(outputs))

    def _run_decode(self, slots: np.ndarray, table: np.ndarray, steps: int) -> Outputs:
        arguments = self._model_state, self._options, self._settings, self._cache, self._state
        self._cache, self._state, outputs = decode(*arguments, slots, table, np.int32(steps))
        return outputs

    def _readable(self, outputs: Outputs) -> Outputs:
        """Returns the outputs as every process can read them."""
        return outputs if self._partition.mesh is None else replicate(self._partition, outputs)

    # Warm-up.

    def warm_up(self) -> None:
        """Compiles every program, several at a time, and runs each on padding, which changes nothing."""
        self._write_padding()
        with ThreadPoolExecutor() as pool:
            # Traced one by one; a later call finds the compiled program.
            compiling = [pool.submit(program.lower(*arguments).compile) for program, arguments in self._calls()]
            for one in compiling:
                one.result()
        for num_rows, length in self._limits.chunk_shapes:
            table, tokens, spans = self._chunk(num_rows, length)
            self._cache, x = prefill_chunk(self._model_state, self._cache, table, tokens, spans)
            if num_rows == 1:
                arrays = self._cache, table, tokens, tokens, spans
                self._cache, *_ = score_chunk(self._model_state, self._options.top_logprobs, *arrays)
            for size in self._first_sizes(num_rows):
                self._sample_first([], size, x)
        for size in self._limits.row_buckets:
            slots, table = np.full(size, self._limits.max_rows, np.int32), np.zeros((size, self._width), np.int32)
            self._readable(self._run_decode(slots, table, 1))

    def _write_padding(self) -> None:
        """Runs the small programs, on a row that is done."""
        vocabulary = self._partition.pad_vocabulary(self._config.vocab_size)
        key, vector = np.zeros(2, np.uint32), np.zeros((1, vocabulary), np.float32)
        row = make_row(GenerationConfig(), self._config.vocab_size, 1, 1, key, False, False, self._partition)
        row = row._replace(vectors=dict.fromkeys(VECTORS, vector))
        self._write_arrays(row, np.zeros(self._positions, np.int32), SlotStart(0, 1, 0, 0))
        self.copy([(0, 0)])
        self._write_mask_arrays([], np.zeros((0, 1), np.uint32))

    def _chunk(self, num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns table, tokens and spans of a chunk of padding."""
        shapes = (num_rows, self._width), (num_rows, length), (num_rows, 2)
        table, tokens, spans = (np.zeros(shape, np.int32) for shape in shapes)
        return table, tokens, spans

    def _first_sizes(self, num_rows: int) -> set[int]:
        """Returns the numbers of rows of the programs that sample first tokens after a chunk of so many prompts."""
        counts = num_rows, self._limits.max_rows
        return {max(num_rows, self._first_bucket(count, num_rows)) for count in counts}

    def _calls(self) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yields the large programs with arguments, those that take longest to compile first."""
        model, limits = self._model_state, self._limits
        for size in limits.row_buckets:
            slots, table = np.zeros(size, np.int32), np.zeros((size, self._width), np.int32)
            rows = self._settings, self._cache, self._state, slots, table, np.int32(1)
            yield decode_program(model, self._options), (model, self._options, *rows)
        for num_rows, length in reversed(limits.chunk_shapes):
            table, tokens, spans = self._chunk(num_rows, length)
            yield prefill_program(model), (model, self._cache, table, tokens, spans)
            if num_rows == 1:
                arrays = self._cache, table, tokens, tokens, spans
                yield score_program(model), (model, self._options.top_logprobs, *arrays)
