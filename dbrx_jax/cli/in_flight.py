"""Completes prompts on the engine: some are in flight at a time, and results come in the order of the file."""

import dataclasses
import itertools
import queue
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.file_engine import open_engine, report_memory
from dbrx_jax.cli.file_run import FileRun, error_of, error_result, item_seed
from dbrx_jax.cli.prompts import Item
from dbrx_jax.errors import EngineClosedError, GenerationError, NotFiniteError

if TYPE_CHECKING:
    from dbrx_jax.engine.engine import Engine
    from dbrx_jax.engine.generation import Generation

AHEAD = 1024  # items that may be complete before one that stands in front of them in the file
AHEAD_BYTES = 64 << 20  # of the lines of all items in flight, unless one alone has more


def complete_on_engine(run: FileRun, items: Iterable[Item]) -> Generator[list[dict[str, Any]]]:
    """Yields results in the order of the items, as soon as the next ones are complete.

    Raises:
      NotFiniteError: none of the first items has finite logits, so that the model is damaged.
      MemoryLimitError: the engine does not fit the memory.
    """
    with report_memory(run), open_engine(run) as engine:
        yield from _InFlight(run, engine).results(items)


@dataclasses.dataclass(eq=False)
class _Entry:
    """Completions of one prompt, which are one request.

    Attributes:
      results: of the items, once they are known.
      damage: error of logits that are not finite.
    """

    items: list[Item]
    generation: "Generation | None" = None
    results: list[dict[str, Any]] | None = None
    damage: NotFiniteError | None = None

    @property
    def num_bytes(self) -> int:
        return self.items[0].row.num_bytes


class _InFlight:
    """Items that the engine completes, and results that wait for those in front of them."""

    def __init__(self, run: FileRun, engine: "Engine"):
        self._run, self._engine = run, engine
        self._entries: deque[_Entry] = deque()  # in the order of the file
        self._finished: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
        self._num_items = self._num_bytes = 0  # of the entries
        self._num_running = self._num_completed = 0  # items that the engine has, and that it completed

    def results(self, items: Iterable[Item]) -> Iterator[list[dict[str, Any]]]:
        entries = _entries(items, max(1, self._run.rows // 4))
        entry = next(entries, None)
        while entry is not None or self._entries:
            while entry is not None and self._has_room(entry):
                self._add(entry)
                entry = next(entries, None)
            if ready := self._take_ready():
                yield ready
            elif self._num_running:
                self._finish(self._finished.get())
                while not self._finished.empty():
                    self._finish(self._finished.get())
            else:
                raise self._damages()[0]  # they alone are held back when nothing runs

    def _has_room(self, entry: _Entry) -> bool:
        """Returns whether the engine, and the results that wait, have room for more items."""
        num_items, num_bytes = len(entry.items), entry.num_bytes
        is_queued = self._num_running and self._num_running + num_items > 2 * self._run.rows
        is_full = self._entries and (
            self._num_items + num_items > self._run.rows + AHEAD or self._num_bytes + num_bytes > AHEAD_BYTES
        )
        return not (is_queued or is_full)

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._num_items += len(entry.items)
        self._num_bytes += entry.num_bytes
        if (error := entry.items[0].error) is None:
            self._submit(entry)
        else:
            entry.results = [error_result(item, error) for item in entry.items]

    def _submit(self, entry: _Entry) -> None:
        from dbrx_jax.engine.request import Request

        config, seeds = entry.items[0].config, [item_seed(item, self._run.seed) for item in entry.items]
        assert config is not None
        config = config.replace({"num_return_sequences": len(seeds)})
        logprobs = 0 if self._run.command.logprobs else None
        try:
            generation = self._engine.submit(Request(entry.items[0].ids, config, seeds, logprobs))
        except EngineClosedError:
            self._raise_error()
        except GenerationError as error:
            entry.results = [error_result(item, error_of(item, error)) for item in entry.items]
            return
        self._num_running += len(entry.items)
        entry.generation = generation
        generation.call_when_done(lambda: self._finished.put(entry))

    def _raise_error(self) -> None:
        """Raises what ended the engine."""
        assert self._engine.error is not None
        raise self._engine.error

    def _finish(self, entry: _Entry) -> None:
        """Takes what the engine has for a request that is done."""
        assert entry.generation is not None
        self._num_running -= len(entry.items)
        chunks: list[list[Any]] = [[] for _ in entry.items]
        try:
            for chunk in entry.generation:
                chunks[chunk.index].append(chunk)
        except EngineClosedError:
            self._raise_error()
        except NotFiniteError as error:
            self._end_damaged(entry, error)
            return
        entry.generation = None
        entry.results = [self._result(item, own) for item, own in zip(entry.items, chunks, strict=True)]
        self._num_completed += len(entry.items)

    def _result(self, item: Item, chunks: list[Any]) -> dict[str, Any]:
        ids = [token for chunk in chunks for token in chunk.tokens]
        logprobs = [token.logprob for chunk in chunks for token in chunk.logprobs]
        text = "".join(chunk.text for chunk in chunks)
        return self._run.result(item, ids, text, logprobs, chunks[-1].finish_reason)

    def _end_damaged(self, entry: _Entry, error: NotFiniteError) -> None:
        """Gives a completion its error; of several completions each is tried alone, as the others may be well."""
        if len(entry.items) > 1:
            place = self._entries.index(entry)
            self._entries.remove(entry)
            for i, item in enumerate(entry.items):
                alone = _Entry([item])
                self._entries.insert(place + i, alone)
                self._submit(alone)
            return
        item = entry.items[0]
        entry.generation, entry.damage = None, error_of(item, error)
        entry.results = [error_result(item, entry.damage)]
        if not self._num_completed and len(damages := self._damages()) >= self._run.rows:
            raise damages[0]

    def _damages(self) -> list[NotFiniteError]:
        """Returns the errors of entries whose logits were not finite, in the order of the file."""
        return [entry.damage for entry in self._entries if entry.damage is not None]

    def _take_ready(self) -> list[dict[str, Any]]:
        """Takes the results that no other is to come before; none that is damaged, as long as all may be."""
        ready: list[dict[str, Any]] = []
        while self._entries:
            entry = self._entries[0]
            if entry.results is None or (entry.damage is not None and not self._num_completed):
                break
            self._entries.popleft()
            self._num_items -= len(entry.items)
            self._num_bytes -= entry.num_bytes
            ready += entry.results
        if ready:
            self._run.rates.update(self._num_completed, self._engine.stats())
        return ready


def _entries(items: Iterable[Item], size: int) -> Iterator[_Entry]:
    """Yields the items, with at most `size` completions of one prompt together."""
    for _, of_row in itertools.groupby(items, key=lambda item: item.row.line):
        while some := list(itertools.islice(of_row, size)):
            yield _Entry(some)
