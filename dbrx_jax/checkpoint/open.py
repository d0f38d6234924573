"""Opening a checkpoint folder of either kind, Orbax or Hugging Face."""

from pathlib import Path

from dbrx_jax.checkpoint.folder import PLAN, CheckpointFolder
from dbrx_jax.checkpoint.huggingface import HuggingFaceFolder
from dbrx_jax.checkpoint.manifest import MANIFEST, read_manifest
from dbrx_jax.checkpoint.orbax import PARAMS, OrbaxFolder, is_orbax, read_quantization
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import check_links, location
from dbrx_jax.hub import FILES
from dbrx_jax.quantization import Quantization


def open_folder(path: str | Path, verify: bool = False) -> CheckpointFolder:
    """Opens a complete checkpoint of either kind.

    Args:
      verify: compare all weights that are read with the digests of an Orbax folder.

    Raises:
      CheckpointError, ConfigError: the folder is not one, or has no digests to verify.
    """
    path = location(path)
    if path.is_dir():
        check_links(path, (*FILES, PARAMS))
    if (path / PLAN).exists():
        raise CheckpointError(
            f"{path}: is a conversion that was not finished; run the same command again to continue it"
        )
    if is_orbax(path):
        return OrbaxFolder.open(path, verify)
    if path.is_dir() and next(path.glob("*.safetensors"), None) is None and not (path / "config.json").exists():
        raise CheckpointError(
            f"{path}: neither an Orbax checkpoint of dbrx-convert's ({MANIFEST} and {PARAMS}/) nor safetensors files"
        )
    if verify:
        require_digests(path)
    return HuggingFaceFolder.open(path)


def stored_quantization(path: Path) -> Quantization | None:
    """Returns the quantisation of an Orbax folder's arrays, from its manifest; None for safetensors.

    Raises:
      CheckpointError: the manifest is missing or damaged.
    """
    return read_quantization(path, read_manifest(path)) if is_orbax(path) else None


def require_digests(path: Path) -> None:
    """Checks that a folder is of the kind that has digests of its weights; its small files show that.

    Raises:
      CheckpointError: it holds safetensors.
    """
    if not is_orbax(path):
        raise CheckpointError(f"{path}: safetensors have no digests to verify; dbrx-convert to-orbax makes them")
