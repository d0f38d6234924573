"""The program dbrx-convert: to-orbax, to-hf, verify, inspect and seal."""

from typing import TYPE_CHECKING

from dbrx_jax.cli.start import start

if TYPE_CHECKING:
    from dbrx_jax.cli.arguments import Program


def main() -> None:
    """Runs the program dbrx-convert."""
    start("dbrx-convert", _find_program)


def _find_program() -> "Program":
    from dbrx_convert.cli import PROGRAM

    return PROGRAM
