"""The command dbrx-convert: to-orbax, to-hf, verify and inspect."""

import sys

from dbrx_jax.cli.start import print_version, quiet_interrupt


def main() -> None:
    """Runs the command dbrx-convert."""
    with quiet_interrupt("dbrx-convert"):
        if sys.argv[1:] == ["--version"]:
            print_version("dbrx-convert")
            return
        from dbrx_convert import cli

        cli.main()
