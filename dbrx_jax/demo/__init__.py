"""Demo checkpoint that comes with the package."""

from importlib import resources
from pathlib import Path

from dbrx_jax.errors import CheckpointError


def source_folder() -> Path:
    """Returns the folder of the demo checkpoint, which is in the published Hugging Face layout.

    Raises:
      CheckpointError: the demo checkpoint is not installed.
    """
    folder = Path(str(resources.files(__name__) / "checkpoint"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the demo checkpoint is not installed; install dbrx-jax again")
    return folder
