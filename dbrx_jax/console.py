"""Output of the commands on stderr: one-line errors, status lines and progress."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from dbrx_jax.errors import DbrxError

LINE_SECONDS = 10  # interval of progress lines where stderr is no terminal


def print_status(line: str) -> None:
    """Prints a line for the user on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def run(program: str, command: Callable[[], Any]) -> NoReturn:
    """Runs a command and exits: with 0, or with 2 and one line if the user's input is at fault."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs at length what our errors say in a line
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
    """Returns the message in one line of printable characters: it may quote an untrusted file."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


@contextlib.contextmanager
def progress(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows progress in bytes, as a bar on a terminal and as lines elsewhere; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(label, num_bytes)
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=num_bytes)
        yield lambda count: bar.advance(task, count)


def _progress_lines(label: str, num_bytes: int) -> Callable[[int], None]:
    """Returns a function that advances the progress and prints it every LINE_SECONDS."""
    begin = last_print = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last_print
        done += count
        now = time.monotonic()
        if now - last_print >= LINE_SECONDS:
            last_print = now
            rate = done / (now - begin)
            print_status(f"{label}: {done / 1e9:.1f} of {num_bytes / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s")

    return advance
