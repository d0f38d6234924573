"""The command dbrx-jax: generate, chat, plan and info."""

import os
import sys

from dbrx_jax.cli.start import print_version, quiet_interrupt


def main() -> None:
    """Runs the command dbrx-jax."""
    with quiet_interrupt("dbrx-jax"):
        from dbrx_jax.console import run

        run("dbrx-jax", _command)


def _command() -> None:
    if sys.argv[1:] == ["--version"]:
        print_version("dbrx-jax")
        return
    from dbrx_jax.cli.arguments import parse

    command = parse(sys.argv[1:])
    # Before JAX is imported.
    from dbrx_jax.runtime import set_process_defaults

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's log below errors
    set_process_defaults()
    command.run()
