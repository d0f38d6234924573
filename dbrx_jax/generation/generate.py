"""Generation on the host: arguments, prompts in chunks, bursts of decode steps, streaming and stops.

Prompts go through the model row by row in chunks of fixed lengths, without padding, so that little is compiled and a
row's numbers do not depend on the others. Then all rows decode together. On a mesh with several data-parallel groups
each group prefills a row of its own at a time.
"""

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.decode import (
    MAX_EOS,
    DecodeState,
    Settings,
    decode,
    empty,
    first_token,
    lower,
    prefill_chunk,
    replicate,
    same_on_all_processes,
    stop_rows,
)
from dbrx_jax.generation.sampling import Sampling, row_keys
from dbrx_jax.model.cache import cache_capacity, prefill_chunks
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model
from dbrx_jax.model.inputs import check_ids
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.sharding.partition import BATCH_AXES, Partition
from dbrx_jax.text.tokenizer import DbrxTokenizer

# Tokens between two looks of the host, where somebody waits for them or they are searched for strings.
BURST = 8
MIN_TEMPERATURE = 1e-3  # logits divided by much less are infinite
_FROM_CHECKPOINT: Any = object()  # "not given", where None means something


class GenerationOutput(NamedTuple):
    """The result of generate with return_dict_in_generate=True."""

    sequences: np.ndarray  # (B, T + N) int32
    logprobs: np.ndarray | None  # (B, N) float32, of the raw logits; NaN behind a row's end


@dataclasses.dataclass
class Timings:
    """Seconds that a stream spent; compile is counted only if compile() was called."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


def generate(
    model: CausalLM,
    input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    streamer: Any = None,
    return_dict_in_generate: bool = False,
    output_logprobs: bool = False,
    **options: Any,
) -> np.ndarray | GenerationOutput:
    """The prompts as given, each with the tokens that follow: (B, T + N).

    N is the number of steps until the last row ended, at most max_new_tokens. A row keeps the token
    that ended it, padded with the pad token after it.

    Args:
      streamer: a function that is called with new tokens (B, n) as they come, or an object with
        put and end as transformers' streamers have.
      return_dict_in_generate: return a :class:`GenerationOutput`.
      output_logprobs: with the above, each token's log-probability under the raw logits.
      **options: see :class:`TokenStream`.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """
    stream = TokenStream(model, input_ids, attention_mask, burst=None if streamer is None else BURST, **options)
    put = getattr(streamer, "put", streamer)
    if hasattr(streamer, "put"):
        put(stream.prompt)
    for tokens in stream:
        if put is not None:
            put(tokens)
    if hasattr(streamer, "end"):
        streamer.end()
    if not return_dict_in_generate:
        return stream.sequences
    return GenerationOutput(stream.sequences, stream.logprobs if output_logprobs else None)


class TokenStream(Iterator[np.ndarray]):
    """The new tokens of a batch as they come: an iterator over arrays (B, n), n from 1 to `burst`.

    Args:
      model: the model.
      input_ids: prompts (B, T).
      attention_mask: 1 for tokens, 0 for padding, left or right; all ones by default.
      max_new_tokens: the most tokens to add.
      do_sample: draw at random rather than take the most probable token; the next four need it.
      temperature: logits are divided by it; above 0.
      top_k: keep the k most probable tokens.
      top_p: keep the most probable tokens that together reach this probability.
      min_p: keep tokens at least this fraction as probable as the most probable one.
      repetition_penalty: above 1 makes tokens already in the row less probable.
      seed: row i draws with fold_in(seed, i); a list gives each row its own; None is never twice the same.
      eos_token_id: id or ids that end a row; the checkpoint's by default, None never stops.
      pad_token_id: fills ended rows; by default the checkpoint's, else the first eos, else 0.
      stop_strings: a row ends with the token that completes one of these in its new text.
      tokenizer: needed for stop_strings.
      burst: tokens a step of the iterator, at most; None takes all at once where nothing needs less.
      cache_length: positions of the cache, at least; calls with the same number share what was compiled.
      cache_dtype: "int8" halves a bfloat16 cache, with a scale for each position and head; None is the model's.
      batch_invariant: bit for bit the same tokens and log-probabilities of a row alone and in any company; see
        docs/batch-invariance.md for what it costs.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """

    def __init__(
        self,
        model: CausalLM,
        input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[ArrayLike, "B T"] | None = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = _FROM_CHECKPOINT,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: DbrxTokenizer | None = None,
        burst: int | None = BURST,
        cache_length: int | None = None,
        cache_dtype: Literal["int8"] | None = None,
        batch_invariant: bool = False,
    ):
        self.prompt, rows = _unpadded(model, input_ids, attention_mask)
        longest = max(map(len, rows))
        _positive("max_new_tokens", max_new_tokens, whole=True)
        if longest + max_new_tokens > model.config.max_seq_len:
            available = model.config.max_seq_len - longest
            raise GenerationError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens is beyond the model's "
                f"{model.config.max_seq_len} positions; "
                + (f"ask for at most {available}" if available > 0 else "shorten the prompt")
            )
        if burst is not None:
            _positive("burst", burst, whole=True)
        eos = _eos_ids(model, eos_token_id)
        self.pad_token_id = _pad_id(model, pad_token_id, eos)
        self._stops = None
        if stop_strings:
            if tokenizer is None:
                raise GenerationError("stop_strings: needs tokenizer=, to know the text of the tokens")
            strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
            self._stops = [_StopSearch(tokenizer, strings) for _ in rows]
        self._max_new = max_new_tokens
        self._burst = min(burst or (BURST if self._stops else max_new_tokens), max_new_tokens)
        self._filtered = do_sample and any(f is not None for f in (top_k, top_p, min_p))
        sampling = _sampling(model.config.vocab_size, temperature, top_k, top_p, min_p, repetition_penalty)
        self._partition = model.partition
        self._groups = self._partition.size(*BATCH_AXES)
        if cache_dtype not in (None, "int8"):
            raise GenerationError(f"cache_dtype: expected int8 or None, got {cache_dtype!r:.40}")
        self._cache_dtype = model.dtype if cache_dtype is None else np.dtype(cache_dtype)
        self._tiled = batch_invariant
        # Rows of padding.
        self._padding_rows = -len(rows) % (self._groups * (ROW_TILE if batch_invariant else 1))
        seeds, row_numbers = _seeds(seed, len(rows), self._partition)
        keys: Any = None
        if do_sample:
            keys = np.pad(np.asarray(_keys(seeds, row_numbers)), ((0, self._padding_rows), (0, 0)))
        padded_eos = np.array(eos + [-1] * (MAX_EOS - len(eos)), np.int32)
        self._settings = Settings(sampling, keys, padded_eos)
        self._eos = eos
        self._model, self._model_state = model, split_model(model)
        self._lengths = np.zeros(len(rows), np.int32)  # new tokens of each row so far
        self._ended = np.zeros(len(rows), bool)
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows, self._steps = rows, 0
        self._state: DecodeState | None = None
        self.timings = Timings()
        self._positions = cache_capacity(max(longest + max_new_tokens, cache_length or 0), self._partition)

    def lowered(self) -> Iterator[tuple[str, Any]]:
        """The programs that this stream will run, by name, each traced when it is asked for and not compiled."""
        return lower(
            self._model_state,
            self._settings,
            self._filtered,
            self._tiled,
            len(self._rows) + self._padding_rows,
            self._positions,
            self._cache_dtype,
            sorted({length for ids in self._rows for _, length in prefill_chunks(len(ids), self._partition)}),
        )

    def compile(self) -> None:
        """Compiles what this stream will run, one program while the next is traced; else the first steps do.

        A second stream of the same shapes has nothing left to compile.
        """
        begin = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            for compiled in [pool.submit(program.compile) for _, program in self.lowered()]:
                compiled.result()
        self.timings.compile += time.perf_counter() - begin

    def __next__(self) -> np.ndarray:
        if self._steps == self._max_new or self._ended.all():
            raise StopIteration
        begin = time.perf_counter()
        first = self._state is None
        if self._state is None:
            self._state = self._prefill()
        else:
            steps = min(self._burst, self._max_new - self._steps)
            self._state = decode(
                self._model_state, self._filtered, self._tiled, self._settings, self._state, np.int32(steps)
            )
        tokens = self._take(self._state)
        if first:
            self.timings.prefill += time.perf_counter() - begin
        else:
            self.timings.decode += time.perf_counter() - begin
        return tokens

    def _prefill(self) -> DecodeState:
        """All prompts through the model, and the first token of each chosen."""
        model = self._model
        rows = [*self._rows, *[np.zeros(0, np.int32)] * self._padding_rows]
        cache, logits = empty(model.config, self._partition, len(rows), self._positions, self._cache_dtype)
        each = len(rows) // self._groups
        for row in range(each):
            mine = rows[row::each]  # of each group
            plans = [list(prefill_chunks(len(ids), self._partition)) for ids in mine]
            for number in range(max(map(len, plans))):
                pieces = [plan[number] if number < len(plan) else (0, 0) for plan in plans]
                # Each row is cut up by its own length alone: groups whose rows are at chunks of other lengths wait.
                for length in sorted({n for _, n in pieces if n}):
                    parts = [
                        ids[s : s + n] if n == length else ids[:0] for ids, (s, n) in zip(mine, pieces, strict=True)
                    ]
                    tokens = np.stack([np.pad(part, (0, length - len(part))) for part in parts])
                    at = [[row, s if len(p) else 0, len(p)] for p, (s, _) in zip(parts, pieces, strict=True)]
                    cache, logits = prefill_chunk(self._model_state, cache, logits, tokens, np.array(at, np.int32))
        prompts = np.stack([np.pad(ids, (0, self._positions - len(ids))) for ids in rows]).astype(np.int32)
        lengths = np.array([max(1, len(ids)) for ids in rows], np.int32)
        done = np.array([not len(ids) for ids in rows])
        return first_token(
            model.config,
            self._partition,
            self._filtered,
            self._tiled,
            self._settings,
            cache,
            logits,
            prompts,
            lengths,
            done,
        )

    def _take(self, state: DecodeState) -> np.ndarray:
        """The tokens since the last look, cut where a stop string was completed."""
        begin, end = self._steps, int(state.step)
        chosen = [state.tokens, state.logprobs]
        if self._groups > 1:
            chosen = replicate(self._partition, chosen)
        tokens, logprobs = (np.array(np.asarray(x)[: len(self._rows), begin:end]) for x in chosen)
        stopped = np.zeros(len(tokens), bool)
        for row in np.flatnonzero(~self._ended):
            length = next((i + 1 for i, t in enumerate(tokens[row]) if t in self._eos), None)
            if self._stops is not None:
                found = self._stops[row].push(tokens[row][:length])
                stopped[row] = found is not None
                length = found or length
            self._lengths[row] += end - begin if length is None else length
            self._ended[row] = length is not None
        behind = begin + np.arange(end - begin) >= self._lengths[:, None]
        tokens[behind], logprobs[behind] = self.pad_token_id, np.nan
        if stopped.any():
            done, running = stop_rows(self._partition, state.done, np.pad(stopped, (0, self._padding_rows)))
            self._state = state._replace(done=done, running=running)
        self._steps = end
        kept = max(1, int(self._lengths.max()) - begin)  # fewer where stop strings ended the last rows
        self._chunks.append((tokens[:, :kept], logprobs[:, :kept]))
        return tokens[:, :kept]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each row's prompt (B,), without padding."""
        return np.array([len(ids) for ids in self._rows])

    @property
    def lengths(self) -> np.ndarray:
        """New tokens of each row so far (B,), the one that ended it included."""
        return self._lengths.copy()

    @property
    def ended(self) -> np.ndarray:
        """Rows that ended by a token or a stop string (B,); the others end at max_new_tokens."""
        return self._ended.copy()

    @property
    def sequences(self) -> np.ndarray:
        """The prompt as given and all tokens so far, (B, T + N) int32."""
        return np.concatenate([self.prompt, *(tokens for tokens, _ in self._chunks)], axis=1)

    @property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities of all new tokens so far under the raw logits, (B, N); NaN behind a row's end."""
        return np.concatenate([np.zeros((len(self.prompt), 0), np.float32), *(p for _, p in self._chunks)], axis=1)


class _StopSearch:
    """Looks for strings in one row's text as it grows."""

    def __init__(self, tokenizer: DbrxTokenizer, strings: list[str]):
        if not all(isinstance(s, str) and s for s in strings):
            raise GenerationError(f"stop_strings: expected texts that are not empty, got {strings!r}")
        self._tokenizer = tokenizer
        self._strings = [s.encode() for s in strings]
        self._tail = b""
        self._keep = max(map(len, self._strings)) - 1

    def push(self, tokens: np.ndarray) -> int | None:
        """Returns how many of these tokens complete a stop string, or None."""
        for count, token in enumerate(tokens, 1):
            text = self._tail + self._tokenizer.token_bytes(int(token), skip_special_tokens=True)
            if any(s in text for s in self._strings):
                return count
            self._tail = text[max(0, len(text) - self._keep) :]
        return None


_keys = jax.jit(row_keys)


def _unpadded(model, input_ids, attention_mask) -> tuple[np.ndarray, list[np.ndarray]]:
    """The prompts as given, and each row's tokens without its padding."""
    ids = np.asarray(check_ids(input_ids, model.config.vocab_size), np.int32)
    if attention_mask is None:
        return ids, list(ids)
    mask = np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise GenerationError(f"attention_mask: expected the shape of input_ids {ids.shape}, got {mask.shape}")
    rows = [row[keep] for row, keep in zip(ids, mask != 0, strict=True)]
    for number, row in enumerate(rows):
        if not len(row):
            raise GenerationError(f"attention_mask: row {number} has no token; a prompt needs at least one")
    return ids, rows


def _eos_ids(model, given: Any) -> list[int]:
    if given is _FROM_CHECKPOINT:
        given = model.generation_config.eos_token_ids
    ids = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if len(ids) > MAX_EOS:
        raise GenerationError(f"eos_token_id: at most {MAX_EOS} ids, got {len(ids)}")
    return [_token_id("eos_token_id", i) for i in ids]


def _pad_id(model, given: int | None, eos: list[int]) -> int:
    for candidate in (given, model.generation_config.pad_token_id, *eos):
        if candidate is not None:
            return _token_id("pad_token_id", candidate)
    return 0


def _token_id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 1 << 31:
        raise GenerationError(f"{name}: expected a token id, got {value!r:.40}")
    return int(value)


def _sampling(vocabulary, temperature, top_k, top_p, min_p, repetition_penalty) -> Sampling:
    _positive("temperature", temperature)
    if temperature < MIN_TEMPERATURE:
        raise GenerationError(
            f"temperature: expected at least {MIN_TEMPERATURE}, got {temperature}; or do_sample=False"
        )
    _positive("repetition_penalty", repetition_penalty)
    if top_k is not None:
        _positive("top_k", top_k, whole=True)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not (isinstance(value, int | float | np.floating) and 0 <= value <= 1):
            raise GenerationError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return Sampling(
        np.float32(temperature),
        np.int32(vocabulary if top_k is None else min(top_k, vocabulary)),
        np.float32(1 if top_p is None else top_p),
        np.float32(0 if min_p is None else min_p),
        np.float32(repetition_penalty),
    )


def _positive(name: str, value: Any, whole: bool = False) -> None:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise GenerationError(f"{name}: expected a {'whole ' if whole else ''}number above 0, got {value!r}")


def _seeds(seed: int | Sequence[int] | None, rows: int, partition: Partition) -> tuple[np.ndarray, np.ndarray | None]:
    """Each row's seed, and the row numbers to fold in where all rows share one."""
    shared = seed is None or isinstance(seed, int | np.integer)
    if seed is None:
        seed = same_on_all_processes(partition, secrets.randbits(32))
    seeds = [seed] * rows if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != rows:
        raise GenerationError(f"seed: expected one for each of {rows} rows, got {len(seeds)}")
    if not all(0 <= s < 1 << 32 for s in seeds):
        raise GenerationError(f"seed: expected whole numbers from 0 to {(1 << 32) - 1}, got {seed!r}")
    return np.array(seeds, np.uint32), np.arange(rows, dtype=np.uint32) if shared else None
