"""A stand-in for the engine: its tokens follow from the prompt alone, at a speed that a test chooses."""

import asyncio
import queue
import threading
import time
import types
from typing import NamedTuple

import numpy as np

from dbrx_jax.engine.request import Chunk, TokenLogprobs
from dbrx_jax.errors import EngineClosedError, GenerationError, QueueFullError, RequestTimeoutError


class FakeStats(NamedTuple):
    running: int = 0
    waiting: int = 0
    blocks: int = 40
    free_blocks: int = 30
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 7
    prefix_hits: int = 3
    preemptions: int = 2
    proposed_tokens: int = 12
    accepted_tokens: int = 9
    compilations_after_warmup: int = 1


class FakeGeneration:
    """Chunks from the engine's thread, for a loop or for another thread."""

    def __init__(self, engine, request):
        self.request, self.prompt_tokens, self.cached_tokens = request, len(request.prompt), 1
        self.prompt_logprobs = None
        self.cancelled, self.ended = False, False
        self.begin = time.monotonic()
        self._engine, self._items, self._wake = engine, queue.SimpleQueue(), None
        self.rows = [_Row(engine, self, index) for index in range(request.config.num_return_sequences or 1)]

    def cancel(self):
        with self._engine.lock:
            if not self.ended and not self.cancelled:
                self.cancelled = True
                self._engine.cancelled.append(self)
                self._engine.forget(self)
                self.put(None)

    def put(self, item):
        """Adds a chunk, an exception, or None at the end."""
        self._items.put(item)
        if (wake := self._wake) is not None:
            loop, event = wake
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def __iter__(self):
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def __aiter__(self):
        event = asyncio.Event()
        self._wake = asyncio.get_running_loop(), event
        while True:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                event.clear()
                if self._items.empty():
                    await event.wait()
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item


class _Row:
    """One completion."""

    def __init__(self, engine, generation, index):
        self.generation, self.index, self.config = generation, index, generation.request.config
        self._engine, self._stream, self._text, self.tokens, self.is_done = (
            engine,
            engine.tokenizer.stream(),
            "",
            [],
            False,
        )

    def step(self):
        request, position = self.generation.request, len(self.tokens)
        logprobs = self._engine.logprobs([*request.prompt, *self.tokens], request.seed or 0, self.index)
        allowed = logprobs.copy()
        if position < (self.config.min_new_tokens or 0):
            allowed[list(self.config.eos_token_id)] = -np.inf
        token = self._engine.script[position] if position < len(self._engine.script) else int(allowed.argmax())
        self.tokens.append(token)
        is_end = token in self.config.eos_token_id
        self._text += self._stream.push([token])
        reason = "stop" if is_end else "length" if len(self.tokens) >= self.config.max_new_tokens else None
        if reason:
            self._text += self._stream.finish()
        text, self._text, stopped = _split(self._text, self.config.stop_strings, reason is not None)
        reason = "stop" if stopped else reason
        entries = ()
        if request.top_logprobs is not None:
            entries = (_entry(logprobs, token, request.top_logprobs),)
        self.is_done = reason is not None
        self.generation.put(Chunk(self.index, (token,), text, entries, reason))


def _split(text, stops, is_last):
    """Returns the text before a stop string or what may begin one, the rest, and whether a stop string came."""
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)], "", True
    keep = 0 if is_last else max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - keep], text[len(text) - keep :], False


def _entry(logprobs, token, count):
    top = np.argsort(-logprobs)[:count]
    return TokenLogprobs(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


class FakeEngine:
    """Generates a token for each running row in each step of `step_seconds`.

    Attributes:
      script: tokens that every completion begins with.
      requests, cancelled: what was submitted, and the generations that were cancelled.
      fail: an exception that ends each request after its first token.
    """

    def __init__(self, tokenizer, *, step_seconds=0.0, max_rows=8, max_waiting=16, max_seq_len=1024, vocab_size=2560):
        self.tokenizer, self.step_seconds, self.script = tokenizer, step_seconds, []
        self.max_rows, self.max_waiting, self.max_seq_len, self.vocab_size = (
            max_rows,
            max_waiting,
            max_seq_len,
            vocab_size,
        )
        self.limits = types.SimpleNamespace(
            positions=max_seq_len, block=128, max_rows=max_rows, max_waiting=max_waiting
        )
        self.requests, self.cancelled, self.error, self.fail = [], [], None, None
        self.lock, self._changed = threading.RLock(), threading.Event()
        self._running, self._waiting, self._closed = [], [], False
        self._prompt_tokens = self._generation_tokens = 0
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request):
        with self.lock:
            if self._closed or self.error is not None:
                raise EngineClosedError("the engine takes no more requests")
            if len(request.prompt) + request.config.max_new_tokens > self.max_seq_len:
                raise GenerationError("the prompt and its new tokens do not fit the model")
            assert all(0 <= token < self.vocab_size for token in request.prompt)
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already")
            generation = FakeGeneration(self, request)
            self.requests.append(request)
            self._waiting.append(generation)
        self._changed.set()
        return generation

    def logprobs(self, tokens, seed, index):
        """Log-probabilities (V,) of the next token: a function of the tokens before, the seed and the completion."""
        random = np.random.default_rng([len(tokens), sum(tokens), seed, index])
        logits = random.normal(size=64).astype(np.float32) * 3
        logprobs = np.full(self.vocab_size, -20.0, np.float32)
        logprobs[random.choice(2500, 64, replace=False)] = logits - np.log(np.exp(logits).sum())
        return logprobs

    def stats(self):
        with self.lock:
            return FakeStats(
                len(self._running), len(self._waiting),
                prompt_tokens=self._prompt_tokens, generation_tokens=self._generation_tokens,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, drain_seconds=0.0):
        with self.lock:
            self._closed = True
            self._end_all(EngineClosedError("the engine was closed"))
        self._changed.set()
        self._thread.join()

    def die(self, error):
        """Ends the engine as a failure in its thread would."""
        with self.lock:
            self.error = error
            self._end_all(EngineClosedError("the engine has failed"))
        self._changed.set()

    def forget(self, generation):
        for some in (self._running, self._waiting):
            if generation in some:
                some.remove(generation)

    def _end_all(self, error):
        for generation in [*self._running, *self._waiting]:
            self._end(generation, error)

    def _end(self, generation, item):
        generation.ended = True
        self.forget(generation)
        generation.put(item)

    def _loop(self):
        while True:
            self._changed.wait(self.step_seconds or None)
            with self.lock:
                if self._closed or self.error is not None:
                    return
                self._changed.clear()
                while self._waiting and len(self._running) < self.max_rows:
                    self._begin(self._waiting.pop(0))
                for generation in [*self._running, *self._waiting]:
                    timeout = generation.request.timeout
                    if timeout is not None and time.monotonic() > generation.begin + timeout:
                        self._end(generation, RequestTimeoutError(f"the request took more than {timeout} seconds"))
                for generation in [*self._running]:
                    self._step(generation)
                if self._running and not self.step_seconds:
                    self._changed.set()
            if self.step_seconds:
                time.sleep(self.step_seconds)
            else:
                time.sleep(0)

    def _begin(self, generation):
        request = generation.request
        self._prompt_tokens += len(request.prompt)
        if request.prompt_logprobs is not None:
            generation.prompt_logprobs = [None] + [
                _entry(self.logprobs(request.prompt[:i], 0, 0), request.prompt[i], request.prompt_logprobs)
                for i in range(1, len(request.prompt))
            ]
        self._running.append(generation)

    def _step(self, generation):
        if self.fail is not None and generation.rows[0].tokens:
            self._end(generation, self.fail)
            return
        for row in generation.rows:
            if not row.is_done:
                row.step()
                self._generation_tokens += 1
        if all(row.is_done for row in generation.rows):
            self._end(generation, None)
