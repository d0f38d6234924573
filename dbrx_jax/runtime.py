"""Process-wide settings of JAX for commands and scripts: GPU memory and the compilation cache.

The library itself sets nothing; docs/kernels.md lists the settings for programs that use it.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

# The fraction of a GPU's memory that JAX reserves when it starts. Its default, 0.75, is 113 GB of an H200: too little
# for DBRX 132B in int8, which takes 132 GB. On a TPU all memory is available.
ENVIRONMENT: Mapping[str, str] = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
MIN_SECONDS = 0.3  # programs that compile faster are not cached


def set_process_defaults() -> None:
    """Sets the variables of ENVIRONMENT that the user has not set; call it before JAX starts its devices."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def enable_compilation_cache(print_status: Callable[[str], None]) -> None:
    """Makes JAX cache compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR is set.

    JAX runs the programs that it reads there, so a folder that others may write to is not used.

    Args:
      print_status: called with a line of text if the folder cannot be used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = user_cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        print_status(f"Compiled programs are not cached: {folder} cannot be used ({error.strerror})")
        return
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        print_status(f"Compiled programs are not cached: {folder} is not yours alone to write to; remove it")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def user_cache_folder() -> Path:
    """Returns the package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dbrx_jax"
