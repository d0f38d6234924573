"""The start of a program, before its modules are imported. This one imports next to nothing."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbrx_jax.cli.arguments import Program


def start(name: str, find_program: Callable[[], "Program"], prepare: Callable[[], None] | None = None) -> None:
    """Runs the command that the process' arguments name, and exits.

    Args:
      name: of the program.
      find_program: imports the program's modules.
      prepare: called before the command is run.
    """
    with _quiet_interrupt(name):
        from dbrx_jax.console import run

        def command() -> None:
            if sys.argv[1:] == ["--version"]:
                _print_version(name)
                return
            parsed = find_program().parse(sys.argv[1:])
            if prepare is not None:
                prepare()
            parsed.run()

        run(name, command)


@contextlib.contextmanager
def _quiet_interrupt(program: str) -> Iterator[None]:
    """Ends the program with one line and status 130 on Ctrl-C, also while modules are imported.

    A second Ctrl-C ends it at once.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _print_version(program: str) -> None:
    """Prints the version of the installed package, which has both programs."""
    from importlib.metadata import version

    print(f"{program} {version('dbrx-jax')}")
