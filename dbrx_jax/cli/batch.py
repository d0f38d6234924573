"""Completes a file of prompts in batches."""

import contextlib
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.load import Checkpoint, load_weights, open_checkpoint
from dbrx_jax.cli.options import GenerateOptions
from dbrx_jax.cli.output import Output, check_output, open_output
from dbrx_jax.cli.prompts import Item, PromptsFile, Survey
from dbrx_jax.cli.rates import Rates, row_progress
from dbrx_jax.console import print_status
from dbrx_jax.errors import DbrxError, GenerationError, NotFiniteError

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.generation.stream import TokenStream
    from dbrx_jax.generation_config import GenerationConfig


def complete_file(command: GenerateOptions, first: bool) -> bool:
    """Completes the prompts of a file; returns whether every row has a completion.

    Args:
      first: this is the only process, or the first: it alone writes the results.

    Raises:
      DbrxError: the options or the checkpoint cannot be used; a row that cannot be used gets an error in its result.
    """
    assert command.file is not None
    options = command.given_options()
    if first:
        check_output(command.output, command.file)
    with contextlib.closing(PromptsFile(command.file)) as prompts:
        checkpoint = open_checkpoint(command)
        survey = prompts.survey(checkpoint, options)
        if survey.errors:
            print_status(f"{prompts.name}: {survey.errors} rows get an error for a completion; {survey.first_error}")
        command.check_same_on_all_processes(survey.sha256)
        identity = {"prompts": survey.sha256} | command.result_options()
        with contextlib.closing(open_output(command.output if first else None, identity)) as output:
            runner = _Runner(command, checkpoint, survey, output)
            try:
                _run(runner, prompts.items(checkpoint, options, runner.start), output)
            except BaseException:
                if line := output.explain(survey.num_items):
                    print_status(line)
                raise
            output.finish()
    print_status(runner.rates.summary())
    if output.num_errors:
        print_status(f"{output.num_errors} of {survey.num_items} rows have an error")
    return not output.num_errors


def _run(runner: "_Runner", items: Iterator[Item], output: Output) -> None:
    """Completes the items and writes their results."""
    done = runner.start
    # A bar and results on the same terminal would mix.
    with row_progress(runner.num_items, runner.rates, bar=not sys.stdout.isatty()) as advance:
        for batch in batches(items, runner.rows):
            output.write(runner.results(batch))
            done += len(batch)
            advance(done)


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


class _Runner:
    """Completes batches with the model, which it loads.

    Attributes:
      num_items: of the whole file.
      rows: that the programs are compiled for.
      start: number of the first item to complete, after those of an earlier run.
      rates: of what has run.
    """

    def __init__(self, command: GenerateOptions, checkpoint: Checkpoint, survey: Survey, output: Output):
        from dbrx_jax.generation.processes import same_on_all_processes

        self._command, self._checkpoint = command, checkpoint
        self.num_items, self._positions = survey.num_items, survey.positions
        self.rows = min(command.batch_size, survey.num_items)
        self._model: DbrxForCausalLM = load_weights(checkpoint, command, self.rows, survey.positions)
        partition = self._model.partition
        # The first process alone has read the results of an earlier run.
        self.start = same_on_all_processes(partition, output.num_done)
        output.num_errors = same_on_all_processes(partition, output.num_errors)
        self._seed = same_on_all_processes(partition, secrets.randbits(32) if command.seed is None else command.seed)
        self.rates = Rates()

    def results(self, batch: list[Item]) -> list[dict[str, Any]]:
        """Returns the results of items with the same options, in their order.

        Raises:
          NotFiniteError: no item of the first batch has finite logits, so that the model is damaged.
          MemoryLimitError: the batch does not fit the memory.
        """
        good = [item for item in batch if item.error is None]
        is_first = not self.rates.num_rows
        outcomes = self._complete(good)
        damaged = [outcome for outcome in outcomes if isinstance(outcome, NotFiniteError)]
        if is_first and damaged and len(damaged) == len(good):
            raise damaged[0]
        completed = iter(outcomes)
        results = []
        for item in batch:
            outcome = next(completed) if item.error is None else {"error": item.error}
            results.append(_result(item, {"error": str(outcome)} if isinstance(outcome, DbrxError) else outcome))
        return results

    def _complete(self, items: list[Item]) -> list[dict[str, Any] | GenerationError]:
        """Returns the fields of results, or their errors; if the items fail together, of each alone."""
        from dbrx_jax.planning.memory_check import generation_request, report_generation_memory

        if not items:
            return []
        try:
            stream = self._stream(items)
            with report_generation_memory(generation_request(self._model, stream)):
                for _ in stream:
                    pass
        except GenerationError as error:
            if len(items) == 1:
                return [type(error)(f"line {items[0].row.line}: {str(error).removeprefix('row 0: ')}")]
            return [outcome for item in items for outcome in self._complete([item])]
        self.rates.add(stream, len(items))
        return [self._fields(stream, row, item) for row, item in enumerate(items)]

    def _stream(self, items: list[Item]) -> "TokenStream":
        from dbrx_jax.generation.stream import TokenStream

        config = items[0].config
        assert config is not None
        return TokenStream(
            self._model,
            [item.ids for item in items],
            generation_config=config.replace({"num_return_sequences": None}),  # each is an item
            tokenizer=self._checkpoint.tokenizer,
            seed=[item_seed(item, self._seed) for item in items],
            burst=None,
            cache_length=self._positions,
            batch_size=self.rows,
            **self._command.cache_arguments(),
        )

    def _fields(self, stream: "TokenStream", row: int, item: Item) -> dict[str, Any]:
        """Returns the fields of one row's result."""
        from dbrx_jax.generation.text_stream import completion_text

        length = int(stream.lengths[row])
        ids = stream.sequences[row, stream.sequences.shape[1] - stream.logprobs.shape[1] :][:length].tolist()
        fields: dict[str, Any] = {
            "completion": completion_text(self._checkpoint.tokenizer, ids, stream.config.stop_strings),
            "finish_reason": "stop" if stream.ended[row] else "length",
            "usage": {"prompt_tokens": len(item.ids), "completion_tokens": length},
        }
        if self._command.token_ids:
            fields["token_ids"] = ids
        if self._command.logprobs:
            fields["logprobs"] = [round(value, 6) for value in stream.logprobs[row, :length].tolist()]
        return fields


def item_seed(item: Item, seed: int) -> int:
    """Returns the seed of a completion: the row's own, else one derived from the command's seed.

    It depends on the row alone, not on its batch or on where an earlier run ended.
    """
    own = item.row.seed
    if own is None:
        return derive_seed(seed, item.row.line, item.index)
    return derive_seed(own, item.index) if item.index else own


def derive_seed(*numbers: int) -> int:
    """Returns a seed of 32 bits for a seed and numbers of a line and a completion."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _result(item: Item, fields: dict[str, Any]) -> dict[str, Any]:
    return item.row.fields | ({"index": item.index} if item.copies > 1 else {}) | fields
