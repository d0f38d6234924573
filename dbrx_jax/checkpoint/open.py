"""Opening a checkpoint folder of either kind, Orbax or Hugging Face."""

from pathlib import Path

from dbrx_jax.checkpoint.folder import PLAN, CheckpointFolder
from dbrx_jax.checkpoint.huggingface import HuggingFaceFolder
from dbrx_jax.checkpoint.orbax import MANIFEST, PARAMS, OrbaxFolder, is_orbax
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import check_links, location
from dbrx_jax.hub import FILES


def open_folder(path: str | Path) -> CheckpointFolder:
    """Opens a complete checkpoint of either kind.

    Raises:
      CheckpointError, ConfigError: the folder is not one.
    """
    path = location(path)
    if path.is_dir():
        check_links(path, (*FILES, PARAMS))
    if (path / PLAN).exists():
        raise CheckpointError(
            f"{path}: is a conversion that was not finished; run the same command again to continue it"
        )
    if is_orbax(path):
        return OrbaxFolder.open(path)
    if path.is_dir() and next(path.glob("*.safetensors"), None) is None and not (path / "config.json").exists():
        raise CheckpointError(
            f"{path}: neither an Orbax checkpoint of dbrx-convert's ({MANIFEST} and {PARAMS}/) nor safetensors files"
        )
    return HuggingFaceFolder.open(path)
