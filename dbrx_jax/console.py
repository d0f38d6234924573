"""Shared by the commands: one-line errors, status lines and progress on stderr."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from dbrx_jax.errors import DbrxError

LINE_SECONDS = 10


def print_status(line: str) -> None:
    """A line for the person at the terminal; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def run(program: str, command: Callable[[], Any]) -> NoReturn:
    """Runs a command and exits: 0, or 2 with one line where the user's input is at fault."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells at length there what our errors say in a line
    warnings.showwarning = lambda message, *_: print_status(f"{program}: warning: {message}")
    try:
        command()
        sys.stdout.flush()
    except DbrxError as error:
        print_status(f"{program}: {_one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        print_status(f"{program}: interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)


def _one_line(error: BaseException) -> str:
    """The message in one line of printable characters, whatever a stranger's file put into it."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with its rate on a terminal, a line now and then elsewhere; yields a function to advance it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _lines(what: str, total: int) -> Callable[[int], None]:
    """Says how far it is every LINE_SECONDS."""
    begin = printed = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        now = time.monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            print_status(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / (now - begin) / 1e9:.2f} GB/s")

    return advance
