"""Opens the source of a conversion, after everything that loading its result needs has been read."""

from pathlib import Path

from dbrx_jax.checkpoint.companions import check_files
from dbrx_jax.checkpoint.folder import CheckpointFolder
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.generation.checkpoint_config import read_generation_config
from dbrx_jax.generation_config import FILE as GENERATION_CONFIG
from dbrx_jax.text.tokenizer_files import check_tokenizer, tokenizer_files


def open_source(source: Path) -> tuple[CheckpointFolder, list[Path]]:
    """Opens a checkpoint; returns it with the files beside its weights that a conversion copies.

    Raises:
      CheckpointError: it is incomplete or damaged, or a file to copy is a link out of the folder.
      ConfigError: config.json or generation_config.json cannot be used.
      TokenizerError: a file of the tokenizer is damaged.
    """
    checkpoint = open_folder(source)
    files = tokenizer_files(source)
    generation_config = source / GENERATION_CONFIG
    if generation_config.is_symlink() or generation_config.exists():
        files.append(generation_config)
    check_files(source, files)
    check_tokenizer(source)
    read_generation_config(source)
    return checkpoint, files
