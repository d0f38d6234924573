"""TokenStream: generates a batch in bursts of decode steps and yields its new tokens."""

import dataclasses
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.console import announce
from dbrx_jax.errors import GenerationError, NotFiniteError
from dbrx_jax.generation.decode import decode, sample_first
from dbrx_jax.generation.lowering import lower
from dbrx_jax.generation.prefill import empty_cache, prefill
from dbrx_jax.generation.processes import broadcast, replicate, same_on_all_processes
from dbrx_jax.generation.processors import LogitsFunction
from dbrx_jax.generation.prompts import new_token_limit, unpadded
from dbrx_jax.generation.settings import make_keys, make_settings, row_seeds
from dbrx_jax.generation.state import Options, Outputs, RowState, changes_logits, end_rows, start_rows
from dbrx_jax.generation.stops import Deadline, StoppingCriterion, StopSearch, ends_by_criteria
from dbrx_jax.generation_config import SAMPLING_OPTIONS, GenerationConfig
from dbrx_jax.model.cache import Cache, block_positions, cache_capacity, prefill_chunks, round_up_size
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import GraphDefinition, split_model
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.sharding.partition import BATCH_AXES
from dbrx_jax.text.tokenizer import DbrxTokenizer

BURST = 8  # decode steps between two transfers to the host, if it has to look at the tokens as they come
LONGEST_BURST = 64  # otherwise
MAX_ROWS = 1 << 20


@dataclasses.dataclass
class Timings:
    """Seconds that a stream spent in each phase."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class TokenStream(Iterator[np.ndarray]):
    """Iterator over the new tokens of a batch as they are generated: arrays (B, n), n from 1 to `burst`.

    Args:
      model: the model.
      input_ids: prompts (B, T), or lists of token ids of any lengths.
      attention_mask: 1 for tokens, 0 for padding, left or right; all ones by default.
      generation_config: options to begin with instead of the checkpoint's: a GenerationConfig, a dictionary, or the
        path of a file or folder. Token ids that it lacks are the checkpoint's.
      tokenizer: needed for stop_strings.
      seed: row i samples with fold_in(seed, i); a list gives each row its own seed; None draws a new seed.
      logits_processor: functions of token ids (B, S), their numbers (B,) and logits (B, V) that return logits, all JAX
        arrays; part of the compiled program. Ids beyond a row's number are undefined.
      stopping_criteria: functions of the sequences so far (B, T + n) and None, called after each token on the host;
        they return whether all rows end, or for each row.
      burst: limit of tokens in a step of the iterator, at most LONGEST_BURST; None is that, or BURST if the host has to
        look at tokens (stop strings, criteria, a time limit, saved logits).
      cache_length: least number of the cache's positions; calls with the same number share compiled programs.
      batch_size: least number of rows of the compiled programs; likewise.
      cache_dtype: "int8" halves a bfloat16 cache, with a scale for each position and head; None is the model's.
      batch_invariant: bit for bit the same tokens and log-probabilities of a row in a batch of any size; see
        docs/batch-invariance.md for its cost.
      **options: those of :class:`dbrx_jax.generation_config.GenerationConfig`, which docs/generation.md describes.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """

    def __init__(
        self,
        model: CausalLM,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        generation_config: GenerationConfig | Mapping[str, Any] | str | Path | None = None,
        tokenizer: DbrxTokenizer | None = None,
        seed: int | Sequence[int] | None = None,
        logits_processor: LogitsFunction | Sequence[LogitsFunction] = (),
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = (),
        burst: int | None = BURST,
        cache_length: int | None = None,
        batch_size: int | None = None,
        cache_dtype: Literal["int8"] | None = None,
        batch_invariant: bool = False,
        **options: Any,
    ):
        base = _base_config(model.generation_config, generation_config)
        config = self.config = base.replace(options)
        _warn_without_effect(config, options)
        self._model_state, self._model_config, self._partition = split_model(model), model.config, model.partition
        self.pad_token_id = _pad_id(config)
        self.prompt, rows = unpadded(model, input_ids, attention_mask, self.pad_token_id)
        copies = _num_copies(config)
        self.prompt, self._rows = self.prompt.repeat(copies, axis=0), [row for row in rows for _ in range(copies)]
        num_rows, longest_prompt, width = len(self._rows), max(map(len, self._rows)), self.prompt.shape[1]
        limit = model.config.max_seq_len
        self.max_new_tokens = new_token_limit(config, options, width, longest_prompt, limit)
        _check_count("burst", burst, limit)
        _check_count("cache_length", cache_length, limit)
        _check_count("batch_size", batch_size, MAX_ROWS)
        if cache_dtype not in (None, "int8"):
            raise GenerationError(f"cache_dtype: expected int8 or None, got {cache_dtype!r:.40}")
        self._dtype = model.dtype
        self.cache_dtype = model.dtype if cache_dtype is None else np.dtype(cache_dtype)
        self._set_stops(tokenizer, stopping_criteria, options)
        saves = config.output_logits or config.output_scores
        looks = bool(self._stop_searches or self._criteria or self._deadline or saves)
        longest = BURST if saves else LONGEST_BURST
        self._burst = min(burst or (BURST if looks else longest), longest)
        rows_per_group = round_up_size(-(-max(num_rows, batch_size or 1) // self._partition.size(*BATCH_AXES)))
        if batch_invariant:
            rows_per_group = -(-rows_per_group // ROW_TILE) * ROW_TILE
        num_groups = self._partition.size(*BATCH_AXES)
        self._padding_rows = rows_per_group * num_groups - num_rows
        self._positions = cache_capacity(max(longest_prompt + self.max_new_tokens, cache_length or 0), self._partition)
        # Each group of rows numbers its rows and blocks from 0 on; block 0 is spare.
        self._slots = np.tile(np.arange(rows_per_group, dtype=np.int32), num_groups)
        width = self._positions // block_positions(self._partition)
        self._num_blocks = rows_per_group * width + 1
        self._table = 1 + self._slots[:, None] * width + np.arange(width, dtype=np.int32)
        keys, seed = None, row_seeds(seed, num_rows)
        if config.do_sample:
            keys = np.pad(make_keys(seed, num_rows, self._partition), ((0, self._padding_rows), (0, 0)))
        self._settings = make_settings(
            config, model.config.vocab_size, width, self.max_new_tokens, keys, self._partition
        )
        self._options = Options(
            steps=longest,
            batch_invariant=batch_invariant,
            functions=_functions("logits_processor", logits_processor),
            save_logits=config.output_logits,
            save_scores=config.output_scores,
            renormalize=config.renormalize_logits,
        )
        self._lengths = np.zeros(num_rows, np.int32)  # new tokens of each row so far
        self._ended = np.zeros(num_rows, bool)
        self._steps = 0
        self._is_over = False  # the time limit has passed
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and log-probabilities of each burst
        self.scores: list[np.ndarray] = []  # with output_scores: (B, V) of each step, after all processing
        self.logits: list[np.ndarray] = []  # with output_logits: (B, V) of each step, as the model gives them
        self._running: tuple[Cache, RowState] | None = None
        self.timings = Timings()

    def _set_stops(self, tokenizer: DbrxTokenizer | None, criteria: Any, options: Mapping[str, Any]) -> None:
        self._stop_searches = None
        if self.config.stop_strings:
            if tokenizer is None:
                origin = "stop_strings" if "stop_strings" in options else "stop_strings of the generation config"
                raise GenerationError(f"{origin}: needs tokenizer=, to know the text of the tokens")
            self._stop_searches = [StopSearch(tokenizer, self.config.stop_strings) for _ in self._rows]
        self._criteria = _functions("stopping_criteria", criteria)
        self._deadline = None if self.config.max_time is None else Deadline(self.config.max_time)

    def lowered(self) -> Iterator[tuple[str, Any]]:
        """Yields the programs that this stream will run, by name; each is traced when it is needed, not compiled."""
        return lower(
            self._model_state, self._settings, self._options, *self.cache_size, self.cache_dtype, self._chunk_lengths()
        )

    def _chunk_lengths(self) -> list[int]:
        """Returns the lengths of the prompts' chunks, each once."""
        return sorted({length for ids in self._rows for _, length in prefill_chunks(len(ids), self._partition)})

    def compile(self) -> None:
        """Compiles the programs that this stream will run, each while the next is traced; else the first step does.

        A second stream of the same shapes has nothing left to compile.
        """
        shapes = jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype.name), self._settings)
        sizes = (*self.cache_size, self.cache_dtype, *self._chunk_lengths())
        key = (str(shapes), jax.tree.structure(self._settings), self._options, sizes)
        compiled = _compiled.setdefault(self._model_state.definition, set())
        if key in compiled:
            return
        begin, (rows, positions) = time.perf_counter(), self.cache_size
        line = f"Compiling for {rows} row{'s' * (rows > 1)} and {positions} positions, once for these sizes"
        with announce(line), ThreadPoolExecutor() as pool:
            for program in [pool.submit(program.compile) for _, program in self.lowered()]:
                program.result()
        compiled.add(key)
        self.timings.compile += time.perf_counter() - begin

    def __next__(self) -> np.ndarray:
        if self._steps == self.max_new_tokens or self._ended.all() or self._is_over:
            raise StopIteration
        if self._running is None:
            self.compile()
            begin = time.perf_counter()
            if self._deadline is not None:
                self._deadline.start()
            cache, state, outputs = self._prefill()
            tokens = self._collect(cache, state, outputs)
            self.timings.prefill += time.perf_counter() - begin
        else:
            begin = time.perf_counter()
            steps = np.int32(min(self._burst, self.max_new_tokens - self._steps))
            arguments = self._model_state, self._options, self._settings, *self._running
            cache, state, outputs = decode(*arguments, self._slots, self._table, steps)
            tokens = self._collect(cache, state, outputs)
            self.timings.decode += time.perf_counter() - begin
        return tokens

    def _prefill(self) -> tuple[Cache, RowState, Outputs]:
        """Runs the model on all prompts and samples each row's first token."""
        rows = [*self._rows, *[np.zeros(0, np.int32)] * self._padding_rows]
        config, partition = self._model_config, self._partition
        cache = empty_cache(config, partition, self._num_blocks, self.cache_dtype)
        model = (self._model_state, config, partition)
        cache, hidden = prefill(*model, rows, cache, self._table, self._dtype)
        prompts = np.stack([np.pad(ids, (0, self._positions - len(ids))) for ids in rows])
        lengths = np.array([max(1, len(ids)) for ids in rows], np.int32)
        limits = np.where([len(ids) for ids in rows], self.max_new_tokens, 0).astype(np.int32)
        state = start_rows(config, partition, self._options, self._settings, prompts, lengths, limits)
        arguments = (self._model_state, self._options, self._settings, state, self._slots, hidden, self._slots)
        return cache, *sample_first(*arguments)

    def _collect(self, cache: Cache, state: RowState, outputs: Outputs) -> np.ndarray:
        """Returns the new tokens of a call (B, n), and ends rows that the host has to end."""
        arrays = [a for a in outputs if a is not None]
        if self._partition.mesh is not None:
            arrays = replicate(self._partition, arrays)
        count, tokens, logprobs, *saved = (np.asarray(a) for a in arrays)
        start, stop = self._steps, self._steps + int(count)
        rows, steps = len(self._rows), np.arange(start, stop)
        tokens, logprobs = (a[:rows, :count].copy() for a in (tokens, logprobs))
        is_eos = np.isin(tokens, self.config.eos_token_id)
        eos_ends = np.where(is_eos.any(axis=1), is_eos.argmax(axis=1) + 1, stop - start + 1)
        eos_ends = np.where(self._ended, 0, eos_ends)
        self._check_finite(logprobs, eos_ends)
        stopped = self._end_rows(tokens, eos_ends)
        is_padding = steps >= self._lengths[:, None]
        tokens[is_padding], logprobs[is_padding] = self.pad_token_id, np.nan
        if stopped.any():
            ended = np.pad(stopped, (0, self._padding_rows))
            state = state._replace(done=end_rows(self._partition, state.done, ended))
        self._running, self._steps = (cache, state), stop
        num_tokens = max(1, int(self._lengths.max()) - start)  # fewer if the host ended the last rows
        self._chunks.append((tokens[:, :num_tokens], logprobs[:, :num_tokens]))
        wanted = ((self.config.output_logits, self.logits), (self.config.output_scores, self.scores))
        for array, target in zip(saved, [target for is_wanted, target in wanted if is_wanted], strict=True):
            target += [a[:rows, : self._model_config.vocab_size].copy() for a in array[:num_tokens]]
        if self._deadline is not None:
            self._is_over = bool(same_on_all_processes(self._partition, int(self._deadline.is_over())))
        return tokens[:, :num_tokens]

    def _check_finite(self, logprobs: np.ndarray, ends: np.ndarray) -> None:
        """Raises NotFiniteError if the logits of a token were infinite or NaN."""
        is_bad = ~np.isfinite(logprobs) & (np.arange(logprobs.shape[1]) < ends[:, None])
        if is_bad.any():
            row, step = np.argwhere(is_bad)[0]
            others = "for options that ban every token, or " if changes_logits(self._settings, self._options) else ""
            raise NotFiniteError(
                f"row {row}: the logits of new token {self._steps + step + 1} are not finite; look {others}for damaged "
                "weights with dbrx-convert inspect --values"
            )

    def _end_rows(self, tokens: np.ndarray, eos_ends: np.ndarray) -> np.ndarray:
        """Updates the rows' lengths; returns the rows that end although the device does not know it (B,).

        Args:
          tokens: new ones (B, n); what is behind a row's end is not looked at.
          eos_ends: the number of these after which each row ends (B,): 0 if it had, n + 1 if it goes on.
        """
        ends, num_new = eos_ends.copy(), tokens.shape[1]
        if self._stop_searches is not None:
            for row in np.flatnonzero(ends):
                found = self._stop_searches[row].push(tokens[row, : ends[row]])
                ends[row] = ends[row] if found is None else found
        if self._criteria:
            ends = ends_by_criteria(self._criteria, self.sequences, tokens, ends, self.pad_token_id)
            ends = broadcast(self._partition, ends)  # a criterion may look at the clock
        self._lengths += np.minimum(ends, num_new)
        self._ended |= ends <= num_new
        return ends < eos_ends

    @property
    def cache_size(self) -> tuple[int, int]:
        """Rows and positions of the cache."""
        return len(self._rows) + self._padding_rows, self._positions

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Number of tokens of each prompt (B,), without padding."""
        return np.array([len(ids) for ids in self._rows])

    @property
    def lengths(self) -> np.ndarray:
        """Number of new tokens of each row so far (B,), including the one that ended it."""
        return self._lengths.copy()

    @property
    def ended(self) -> np.ndarray:
        """Rows that a token, a stop string or a criterion has ended (B,), bool; a limit ends the others."""
        return self._ended.copy()

    @property
    def sequences(self) -> np.ndarray:
        """The prompts as given and all tokens so far, (B, T + N) int32."""
        return np.concatenate([self.prompt, *(tokens for tokens, _ in self._chunks)], axis=1)

    @property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities of all new tokens so far under the raw logits, (B, N); NaN after a row's end."""
        return np.concatenate([np.zeros((len(self.prompt), 0), np.float32), *(p for _, p in self._chunks)], axis=1)


# Sizes and options of which the programs are compiled, by model.
_compiled: weakref.WeakKeyDictionary[GraphDefinition, set[Any]] = weakref.WeakKeyDictionary()


def _base_config(own: GenerationConfig, given: GenerationConfig | Mapping[str, Any] | str | Path | None):
    """Returns the configuration to begin with: the given one with the checkpoint's token ids, or the checkpoint's."""
    if given is None:
        return own
    if isinstance(given, Mapping):
        given = GenerationConfig.from_dict(given)
    elif isinstance(given, str | Path):
        given = GenerationConfig.from_file(given)
    if not isinstance(given, GenerationConfig):
        raise GenerationError(f"generation_config: expected a GenerationConfig, a dict or a path, got {given!r:.40}")
    ids = {name: getattr(own, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    return given.replace({name: value for name, value in ids.items() if getattr(given, name) in (None, ())})


def _warn_without_effect(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Warns of the caller's options that need do_sample."""
    if config.do_sample:
        return
    given = {name: value for name, value in options.items() if (name, value) != ("temperature", 0)}  # 0 is greedy
    unused = [name for name, off in SAMPLING_OPTIONS.items() if given.get(name) not in (None, off)]
    if unused:
        warnings.warn(f"{', '.join(unused)}: without do_sample=True this has no effect", stacklevel=4)


def _pad_id(config: GenerationConfig) -> int:
    """Returns the padding token: the configuration's, else the first end of sequence, else 0."""
    return next(i for i in (config.pad_token_id, *config.eos_token_id, 0) if i is not None)


def _num_copies(config: GenerationConfig) -> int:
    """Returns how often each prompt is continued."""
    copies = config.num_return_sequences or 1
    if copies > 1 and not config.do_sample:
        raise GenerationError("num_return_sequences: greedy decoding gives the same tokens each time; use do_sample")
    return copies


def _check_count(name: str, value: Any, largest: int) -> None:
    """Raises GenerationError unless the value is None or a whole number from 1 to the largest."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (is_whole and 1 <= value <= largest):
        raise GenerationError(f"{name}: expected a whole number from 1 to {largest}, got {value!r:.40}")


def _functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    """Returns the caller's functions as a tuple."""
    functions = (value,) if callable(value) and not isinstance(value, Sequence) else value or ()
    if not isinstance(functions, Sequence) or not all(map(callable, functions)):
        raise GenerationError(f"{name}: expected functions, got {value!r:.60}")
    return tuple(functions)
