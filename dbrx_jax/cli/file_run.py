"""FileRun: a run of generate --file, the seeds of its completions and their results."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dbrx_jax.cli.load import Checkpoint, load_weights
from dbrx_jax.cli.options import GenerateOptions
from dbrx_jax.cli.output import Output
from dbrx_jax.cli.prompts import Item, Survey
from dbrx_jax.cli.rates import EngineRates, Rates
from dbrx_jax.errors import GenerationError

if TYPE_CHECKING:
    from dbrx_jax.api import DbrxForCausalLM


Error = TypeVar("Error", bound=GenerationError)
ONE_BATCH = 8  # rows of a batch for which the engine's programs, which have all options, are not worth compiling


@dataclasses.dataclass(frozen=True)
class FileRun:
    """A run of generate --file, with its model.

    Attributes:
      rows: completions that are computed together.
      start: number of the first item to complete, after those of an earlier run.
      seed: of rows that have none.
      uses_batches: fixed batches rather than the engine.
      rates: of what has run.
    """

    command: GenerateOptions
    checkpoint: Checkpoint
    survey: Survey
    model: "DbrxForCausalLM"
    rows: int
    start: int
    seed: int
    uses_batches: bool
    rates: Any

    def result(self, item: Item, ids: Sequence[int], text: str, logprobs: Sequence[float], reason: str) -> dict:
        """Returns the result of a completion, by its tokens, its text, their log-probabilities and why it ended."""
        fields: dict[str, Any] = {
            "completion": text,
            "finish_reason": reason,
            "usage": {"prompt_tokens": len(item.ids), "completion_tokens": len(ids)},
        }
        if self.command.token_ids:
            fields["token_ids"] = list(ids)
        if self.command.logprobs:
            fields["logprobs"] = [round(value, 6) for value in logprobs]
        return _kept(item) | fields


def start_run(command: GenerateOptions, checkpoint: Checkpoint, survey: Survey, output: Output) -> FileRun:
    """Loads the model, and finds where an earlier run ended.

    Raises:
      DbrxError: as :func:`load_weights`.
    """
    from dbrx_jax.generation.processes import same_on_all_processes

    rows = min(command.batch_size, survey.num_items)
    uses_batches = _uses_batches(command, survey, rows)
    # The engine runs as many rows as fit.
    model = load_weights(checkpoint, command, rows if uses_batches else 1, survey.positions)
    partition = model.partition
    # The first process alone has read the results of an earlier run.
    start = same_on_all_processes(partition, output.num_done)
    output.num_errors = same_on_all_processes(partition, output.num_errors)
    seed = same_on_all_processes(partition, secrets.randbits(32) if command.seed is None else command.seed)
    rates = Rates() if uses_batches else EngineRates()
    return FileRun(command, checkpoint, survey, model, rows, start, seed, uses_batches, rates)


def _uses_batches(command: GenerateOptions, survey: Survey, rows: int) -> bool:
    """Returns whether the engine does not run on the mesh, or all is one small batch, for which it is slower."""
    from dbrx_jax.sharding.partition import BATCH_AXES
    from dbrx_jax.sharding.recipes import find_axes

    axes = {} if command.mesh is None else find_axes(command.mesh)
    is_one_batch = survey.num_items <= min(rows, ONE_BATCH) and survey.has_same_options
    return is_one_batch or any(axes.get(axis, 1) > 1 for axis in BATCH_AXES)


def error_result(item: Item, error: GenerationError | str) -> dict[str, Any]:
    """Returns the result of a row without a completion."""
    return _kept(item) | {"error": str(error)}


def error_of(item: Item, error: Error) -> Error:
    """Returns an error of generating with the line of the row that has it."""
    return type(error)(f"line {item.row.line}: {str(error).removeprefix('row 0: ')}")


def _kept(item: Item) -> dict[str, Any]:
    """Returns the fields of a result that the row gives."""
    return item.row.fields | ({"index": item.index} if item.copies > 1 else {})


def item_seed(item: Item, seed: int) -> int:
    """Returns the seed of a completion: the row's own, else one derived from the command's seed.

    It depends on the row alone, not on what runs beside it or on where an earlier run ended.
    """
    own = item.row.seed
    if own is None:
        return derive_seed(seed, item.row.line, item.index)
    return derive_seed(own, item.index) if item.index else own


def derive_seed(*numbers: int) -> int:
    """Returns a seed of 32 bits for a seed and numbers of a line and a completion."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
