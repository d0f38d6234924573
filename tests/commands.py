"""Runs the command lines in the process of the tests."""

import io
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest

import dbrx_convert.main
import dbrx_jax.cli.main
import dbrx_jax.runtime


def in_process(name, *arguments, stdin=b""):
    """Runs a command in this process, which has imported JAX and shares what it compiles."""
    main = {"dbrx-jax": dbrx_jax.cli.main.main, "dbrx-convert": dbrx_convert.main.main}[name]
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        # The command would change these settings of the process.
        patch.setattr(dbrx_jax.runtime, "enable_compilation_cache", lambda: None)
        patch.setattr(dbrx_jax.runtime, "set_process_defaults", lambda: None)
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as exit_info:
            main()
    out.flush()
    return subprocess.CompletedProcess(
        arguments, exit_info.value.code, out.buffer.getvalue().decode(), errors.getvalue()
    )
