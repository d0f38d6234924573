"""Process-wide settings of JAX for programs that own their process: GPU memory and compiled programs.

The library itself sets nothing; docs/kernels.md says what to set where it is used in another program.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

# The share of a GPU's memory that JAX takes when it starts. Its own three quarters of an H200 are 113 GB: 132B in
# int8 takes 132. A TPU's runtime gives all there is.
ENVIRONMENT: Mapping[str, str] = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
MIN_SECONDS = 0.3  # what compiles faster is not kept


def set_process_defaults() -> None:
    """Sets what the user has not set, in this process' environment; before JAX starts its devices."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def enable_compilation_cache(print_status: Callable[[str], None]) -> None:
    """Makes JAX keep what it compiles, unless the user has told it where to (JAX_COMPILATION_CACHE_DIR).

    JAX runs what it finds there: a folder that others may write to is not used.

    Args:
      print_status: called with a line of text where the folder cannot be used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = user_cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        print_status(f"Compiled programs are not kept: {folder} cannot be used ({error.strerror})")
        return
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        print_status(f"Compiled programs are not kept: {folder} is not yours alone to write to; remove it")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def user_cache_folder() -> Path:
    """The package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dbrx_jax"
