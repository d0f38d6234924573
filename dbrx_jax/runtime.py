"""Process-wide settings of JAX for commands and scripts: GPU memory and the compilation cache.

The library itself sets nothing; docs/kernels.md lists the settings for programs that use it.
"""

import contextlib
import glob
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dbrx_jax import console

# The fraction of a GPU's memory that JAX reserves when it starts. Its default, 0.75, is 113 GB of an H200: too little
# for DBRX 132B in int8, which takes 132 GB. On a TPU all memory is available.
ENVIRONMENT: Mapping[str, str] = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
MIN_SECONDS = 0.3  # programs that compile faster are not cached
# JAX's warnings about its cache; it compiles the program then.
CACHE_WARNING = re.compile(
    r"Error (?P<action>reading|writing) persistent compilation cache entry for '(?P<program>[^']*)': "
    r"(\w+: )?(\[Errno \d+\] )?(?P<reason>[^:]*)"
)


def set_process_defaults() -> None:
    """Sets the variables of ENVIRONMENT that the user has not set; call it before JAX starts its devices."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def enable_compilation_cache(print_status: Callable[[str], None] = console.print_status) -> None:
    """Makes JAX cache compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR is set.

    The commands call this. In a script or notebook, call it once, before the first program is compiled. JAX runs
    the programs that it reads there, so a folder that others may write to is not used. A damaged file is removed and
    its program is compiled again; a folder that cannot be written is reported once.

    Args:
      print_status: called with a line of text if the folder cannot be used; by default prints it on stderr.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = user_cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = str(error).rstrip(".")
        if isinstance(error, OSError):
            reason = f"{error.filename}: {error.strerror}"
        print_status(f"Compiled programs are not cached: {reason}; XDG_CACHE_HOME names another folder")
        return
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        print_status(f"Compiled programs are not cached: {folder} is not yours alone to write to; remove it")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    _handle_cache_warnings(folder, print_status)


def user_cache_folder() -> Path:
    """Returns the package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dbrx_jax"


def _handle_cache_warnings(folder: Path, print_status: Callable[[str], None]) -> None:
    """Removes the files that JAX cannot read, before it writes them anew; prints once why it cannot write.

    JAX only warns, and never replaces a file: a damaged one would be compiled in every run.
    """
    show_other_warning = warnings.showwarning
    is_reported = False

    def show_warning(message: Any, *arguments: Any, **options: Any) -> None:
        nonlocal is_reported
        match = CACHE_WARNING.match(str(message))
        if match is None:
            show_other_warning(message, *arguments, **options)
        elif match["action"] == "reading":  # the warning names the program, of which there are files for several shapes
            for file in folder.glob(f"{glob.escape(match['program'])}-*"):
                with contextlib.suppress(OSError):
                    file.unlink()
        elif not is_reported:
            is_reported = True
            print_status(f"Compiled programs are not cached: {folder}: {match['reason']}")

    warnings.showwarning = show_warning
    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache")
