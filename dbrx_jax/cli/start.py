"""The start of a command, before its modules are imported. This one imports next to nothing."""

import contextlib
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_interrupt(program: str) -> Iterator[None]:
    """Ends the program with one line and status 130 on Ctrl-C, also while modules are imported.

    A second Ctrl-C ends it at once.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def print_version(program: str) -> None:
    """Prints the version of the installed package, which has both programs."""
    from importlib.metadata import version

    print(f"{program} {version('dbrx-jax')}")
