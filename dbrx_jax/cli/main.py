"""The program dbrx-jax: generate, chat, serve, plan and info."""

import os
from typing import TYPE_CHECKING

from dbrx_jax.cli.start import start

if TYPE_CHECKING:
    from dbrx_jax.cli.arguments import Program


def main() -> None:
    """Runs the program dbrx-jax."""
    start("dbrx-jax", _find_program, _prepare)


def _find_program() -> "Program":
    from dbrx_jax.cli.commands import PROGRAM

    return PROGRAM


def _prepare() -> None:
    """Makes the settings that JAX reads when it is imported."""
    from dbrx_jax.runtime import set_process_defaults

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's log below errors
    set_process_defaults()
