"""Output of the commands and of long work on stderr: one-line errors, status lines and progress."""

import _thread
import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from dbrx_jax.errors import DbrxError
from dbrx_jax.memory import device_memory, explain_memory_error, host_memory, is_memory_error

DELAY_SECONDS = 2.0  # work that is done sooner is not worth a line
LINE_SECONDS = 10  # interval of progress lines where no bar can be drawn
NOTEBOOK_SECONDS = 0.5  # interval of progress lines that replace each other
# Loggers of libraries that report at length what our errors report in a line.
QUIET_LOGGERS = ("absl", "huggingface_hub")
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_runs_command = False  # whether this process is one of the commands


def print_status(line: str) -> None:
    """Prints a line for the user on stderr, unless nothing can be written there; stdout is for results."""
    with contextlib.suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def run(program: str, command: Callable[[], Any]) -> NoReturn:
    """Runs a command and exits with its status, or prints one line about what stopped it.

    The status is 2 if the user can mend it, 130 after Ctrl-C, and 141 if the reader of stdout has gone.
    """
    _open_closed_streams()
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: print_status(f"{program}: warning: {one_line(message)}")
    memory = host_memory()
    try:
        with _handling_interrupts(program), _showing_long_work():
            try:
                command()
            finally:
                sys.stdout.flush()
    except DbrxError as error:
        _fail(program, one_line(error))
    except KeyboardInterrupt:
        _exit_at_once(program)
    except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
        sys.exit(141)
    except Exception as error:
        if is_memory_error(error):
            device = None if isinstance(error, MemoryError | OSError) else device_memory()
            _fail(program, explain_memory_error(error, memory, device))
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            _fail(program, f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        raise
    sys.exit(0)


def _fail(program: str, line: str) -> NoReturn:
    print_status(f"{program}: {line}")
    sys.exit(2)


@contextlib.contextmanager
def _handling_interrupts(program: str) -> Iterator[None]:
    """Lets Ctrl-C end a `with` block wherever it comes: also during imports and in destructors.

    While a module is imported the process exits at once: an exception in an extension's initialisation crashes it.
    """
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                print_status(f"{program}: interrupted")
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    def interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Repeats a Ctrl-C within a destructor or a callback, which Python prints and forgets."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()  # it would come within this function
        else:
            hook(unraisable)

    if handler is signal.default_int_handler:  # a shell starts jobs in the background with Ctrl-C ignored
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
            # While Python exits, after JAX's own functions of atexit are registered: they print a traceback.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def _showing_long_work() -> Iterator[None]:
    """Makes this process one of the commands, which always show what takes long."""
    global _runs_command
    _runs_command = True
    try:
        yield
    finally:
        _runs_command = False


def _exit_at_once(program: str) -> NoReturn:
    """Ends an interrupted command, without waiting for threads that still work: what they write can be continued."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would print a traceback
    print_status(f"{program}: interrupted")
    if threading.active_count() > 1:
        os._exit(130)
    sys.exit(130)


def _open_closed_streams() -> None:
    """Replaces stdout and stderr, which are None if the command was started without them (`>&-`), by /dev/null."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def printable(text: str) -> str:
    """Returns the text with its control characters but newlines escaped: those of a file could command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """Returns a text that may quote an untrusted file in one line of printable characters."""
    return printable(" ".join(str(text).split()))


def is_shown(requested: bool | None) -> bool:
    """Returns whether to show lines and bars about long work; only the first of several processes ever does.

    Args:
      requested: None shows them in the commands, on a terminal and in a notebook.
    """
    if requested is False or not _is_first_process():
        return False
    return requested or _runs_command or sys.stderr.isatty() or _in_notebook()


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextlib.contextmanager
def announce(line: str, after: float = DELAY_SECONDS, shown: bool | None = None) -> Iterator[None]:
    """Prints a line about the work of a `with` block if it still runs after some seconds.

    Args:
      after: seconds.
      shown: see :func:`is_shown`.
    """
    if not is_shown(shown):
        yield
        return
    timer = threading.Timer(after, print_status, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def progress(
    label: str, num_bytes: int, shown: bool | None = None, after: float = DELAY_SECONDS
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a `with` block that lasts; yields a function that advances it, for any thread.

    It is a bar on a terminal, a line that changes in a notebook, and some lines elsewhere.

    Args:
      num_bytes: all bytes.
      shown: see :func:`is_shown`.
      after: seconds before the bar appears.
    """
    if not is_shown(shown):
        yield lambda count: None
        return
    if _in_notebook():
        draw = _draw_in_notebook()
        try:
            yield _progress_lines(label, num_bytes, draw, after, NOTEBOOK_SECONDS)
        finally:
            draw("")
    elif not can_redraw():
        yield _progress_lines(label, num_bytes, print_status, LINE_SECONDS, LINE_SECONDS)
    else:
        with _bar(label, num_bytes, after) as advance:
            yield advance


def can_redraw() -> bool:
    """Returns whether bars can be drawn: on a terminal that moves its cursor, and in a notebook."""
    from rich.console import Console

    return _in_notebook() or Console(stderr=True).is_interactive


@contextlib.contextmanager
def _bar(label: str, num_bytes: int, after: float) -> Iterator[Callable[[int], None]]:
    """Draws a bar of bytes, their rate and the time left on the terminal, and erases it at the end of the block."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, expand=True, redirect_stdout=False)
    task = bar.add_task(label, total=num_bytes)
    timer = threading.Timer(after, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda count: bar.advance(task, count)
    finally:
        timer.cancel()
        timer.join()  # it may be drawing the bar for the first time
        if bar.live.is_started:
            bar.stop()


def _draw_in_notebook() -> Callable[[str], None]:
    """Returns a function that shows a line below the cell, in place of the one before; needs no widgets."""
    from IPython.display import display

    handle: Any = None

    def draw(line: str) -> None:
        nonlocal handle
        if handle is not None:
            handle.update({"text/plain": line}, raw=True)
        elif line:
            handle = display({"text/plain": line}, raw=True, display_id=True)

    return draw


def _progress_lines(
    label: str, num_bytes: int, show: Callable[[str], None], first: float, interval: float
) -> Callable[[int], None]:
    """Returns a function that advances the progress and shows it after `first` seconds and then at intervals."""
    begin = time.monotonic()
    next_line = begin + first
    done = 0
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done, next_line
        with lock:
            done += count
            now = time.monotonic()
            if now < next_line:
                return
            next_line = now + interval
            rate = done / (now - begin)
            left = (num_bytes - done) / rate
            show(f"{label}: {done / 1e9:.1f} of {num_bytes / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left")

    return advance
