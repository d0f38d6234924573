"""The checkpoint that comes with the package, so that everything runs with nothing downloaded."""

from importlib import resources
from pathlib import Path

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
