"""Completes a file of prompts: reads the prompts, and writes the results in their order."""

import contextlib
import sys
from collections.abc import Iterator

from dbrx_jax.cli.file_engine import follow_first_process
from dbrx_jax.cli.file_run import FileRun, start_run
from dbrx_jax.cli.fixed_batches import complete_in_batches
from dbrx_jax.cli.in_flight import complete_on_engine
from dbrx_jax.cli.load import open_checkpoint
from dbrx_jax.cli.options import GenerateOptions
from dbrx_jax.cli.output import Output, check_output, open_output
from dbrx_jax.cli.prompts import Item, PromptsFile
from dbrx_jax.cli.rates import row_progress
from dbrx_jax.console import print_status


def complete_file(command: GenerateOptions, first: bool) -> bool:
    """Completes the prompts of a file; returns whether every row has a completion.

    Args:
      first: this is the only process, or the first: it alone writes the results.

    Raises:
      DbrxError: the options or the checkpoint cannot be used; a row that cannot be used gets an error in its result.
    """
    from dbrx_jax.generation.processes import same_on_all_processes

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
            run = start_run(command, checkpoint, survey, output)
            try:
                if first or run.uses_batches:
                    _complete(run, prompts.items(checkpoint, options, run.start), output)
                else:
                    follow_first_process(run)
            except BaseException:
                if line := output.explain(survey.num_items):
                    print_status(line)
                raise
            output.finish()
    print_status(run.rates.summary())
    num_errors = same_on_all_processes(run.model.partition, output.num_errors)  # the first process alone may know
    if num_errors:
        print_status(f"{num_errors} of {survey.num_items} rows have an error")
    return not num_errors


def _complete(run: FileRun, items: Iterator[Item], output: Output) -> None:
    """Completes the items and writes their results."""
    done, complete = run.start, complete_in_batches if run.uses_batches else complete_on_engine
    # A bar and results on the same terminal would mix.
    with (
        row_progress(run.survey.num_items, run.rates, bar=not sys.stdout.isatty()) as advance,
        contextlib.closing(complete(run, items)) as all_results,
    ):
        for results in all_results:
            output.write(results)
            done += len(results)
            advance(done)
