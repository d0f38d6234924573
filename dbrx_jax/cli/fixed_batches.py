"""Completes prompts in fixed batches: files of one small batch, and meshes with axes for rows."""

from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.file_run import FileRun, error_of, error_result, item_seed
from dbrx_jax.cli.prompts import Item
from dbrx_jax.errors import GenerationError, NotFiniteError

if TYPE_CHECKING:
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.generation_config import GenerationConfig


def complete_in_batches(run: FileRun, items: Iterable[Item]) -> Generator[list[dict[str, Any]]]:
    """Yields the results of each batch.

    Raises:
      NotFiniteError: no item of the first batch has finite logits, so that the model is damaged.
      MemoryLimitError: a batch does not fit the memory.
    """
    for batch in batches(items, run.rows):
        good = [item for item in batch if item.error is None]
        is_first = not run.rates.num_rows
        outcomes = _complete(run, good)
        damaged = [outcome for outcome in outcomes if isinstance(outcome, NotFiniteError)]
        if is_first and damaged and len(damaged) == len(good):
            raise damaged[0]
        completed = iter(outcomes)
        results = []
        for item in batch:
            outcome = next(completed) if item.error is None else item.error
            results.append(outcome if isinstance(outcome, dict) else error_result(item, outcome))
        yield results


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields consecutive items, at most `size`, which have the same options but for the seed."""
    batch: list[Item] = []
    shared: GenerationConfig | None = None
    for item in items:
        if batch and (len(batch) == size or (shared is not None and item.config not in (None, shared))):
            yield batch
            batch, shared = [], None
        batch.append(item)
        shared = item.config if shared is None else shared
    if batch:
        yield batch


def _complete(run: FileRun, items: list[Item]) -> list[dict[str, Any] | GenerationError]:
    """Returns results of items with the same options, or their errors; if they fail together, of each alone."""
    from dbrx_jax.planning.memory_check import generation_request, report_generation_memory

    if not items:
        return []
    try:
        stream = _stream(run, items)
        with report_generation_memory(generation_request(run.model, stream)):
            for _ in stream:
                pass
    except GenerationError as error:
        if len(items) == 1:
            return [error_of(items[0], error)]
        return [outcome for item in items for outcome in _complete(run, [item])]
    run.rates.add(stream, len(items))
    return [_result(run, stream, row, item) for row, item in enumerate(items)]


def _stream(run: FileRun, items: list[Item]) -> "TokenStream":
    from dbrx_jax.generation.stream import TokenStream

    config = items[0].config
    assert config is not None
    return TokenStream(
        run.model,
        [item.ids for item in items],
        generation_config=config.replace({"num_return_sequences": None}),  # each is an item
        tokenizer=run.checkpoint.tokenizer,
        seed=[item_seed(item, run.seed) for item in items],
        burst=None,
        cache_length=run.survey.positions,
        batch_size=run.rows,
        **run.command.cache_arguments(),
    )


def _result(run: FileRun, stream: "TokenStream", row: int, item: Item) -> dict[str, Any]:
    from dbrx_jax.generation.text_stream import completion_text

    length = int(stream.lengths[row])
    ids = stream.sequences[row, stream.sequences.shape[1] - stream.logprobs.shape[1] :][:length].tolist()
    text = completion_text(run.checkpoint.tokenizer, ids, stream.config.stop_strings)
    reason = "stop" if stream.ended[row] else "length"
    return run.result(item, ids, text, stream.logprobs[row, :length].tolist(), reason)
