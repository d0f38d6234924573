"""The checkpoint that comes with the package, so that everything runs with nothing downloaded."""

import hashlib
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from dbrx_jax.compilation_cache import user_cache
from dbrx_jax.errors import CheckpointError


def source_folder() -> Path:
    """The demo in the published Hugging Face layout, as it comes with the package.

    Raises:
      CheckpointError: the installation lacks it.
    """
    folder = Path(str(resources.files(__name__) / "checkpoint"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the demo checkpoint is not installed; install dbrx-jax again")
    return folder


def cached_checkpoint(say: Callable[[str], None]) -> Path:
    """The demo as an Orbax checkpoint in the user's cache folder, converted on first use.

    Args:
      say: called with a line of text when there is something to convert.

    Raises:
      CheckpointError: the cache folder cannot be written.
    """
    from dbrx_jax.convert.orbax_folder import FORMAT_VERSION, is_orbax
    from dbrx_jax.convert.to_orbax import to_orbax

    source = source_folder()
    digest = hashlib.sha256()
    for file in sorted(source.iterdir()):
        digest.update(file.read_bytes())
    folder = user_cache() / f"demo-{digest.hexdigest()[:12]}-v{FORMAT_VERSION}"
    if is_orbax(folder):
        return folder
    say(f"Converting the demo checkpoint to Orbax in {folder}")
    for _ in range(100):
        try:
            to_orbax(source, folder)
        except CheckpointError:
            # Another process may have begun the same, or just finished it.
            if not is_orbax(folder) and not folder.with_name(f"{folder.name}.incomplete").exists():
                raise
            time.sleep(0.2)
        if is_orbax(folder):
            return folder
    raise CheckpointError(f"{folder}: another process has been converting the demo to it for long; remove it and retry")
