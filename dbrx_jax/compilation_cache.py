"""Compiled programs kept between runs, in the user's own cache folder. For commands, which own their process."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

LEAST_SECONDS = 0.3  # what compiles faster is not kept


def keep_compiled(say: Callable[[str], None]) -> None:
    """Makes JAX keep what it compiles, unless the user has told it where to (JAX_COMPILATION_CACHE_DIR).

    JAX runs what it finds there: a folder that others may write to is not used.

    Args:
      say: called with a line of text where the folder cannot be used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = user_cache() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        say(f"Compiled programs are not kept: {folder} cannot be used ({error.strerror})")
        return
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        say(f"Compiled programs are not kept: {folder} is not yours alone to write to; remove it")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def user_cache() -> Path:
    """The package's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dbrx_jax"
