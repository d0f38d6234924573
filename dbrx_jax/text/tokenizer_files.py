"""The tokenizer's files of a checkpoint: which they are, and whether all that loading needs can be read."""

import base64
import tempfile
from pathlib import Path

from dbrx_jax.errors import ConfigError, TokenizerError
from dbrx_jax.files import read_json
from dbrx_jax.text.tokenizer import TOKENIZER_FILES, DbrxTokenizer
from dbrx_jax.text.tokenizer_config import additional_templates
from dbrx_jax.text.vocabulary import MAX_ID

_VOCABULARIES = ("tokenizer.json", "vocab.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder, and of its folder of templates, that belong to its tokenizer."""
    files = sorted(f for f in folder.iterdir() if f.name in TOKENIZER_FILES or f.suffix == ".tiktoken")
    return files + additional_templates(folder)


def check_tokenizer(folder: Path) -> None:
    """Reads all that a folder has of a tokenizer, as loading will; a vocabulary may be absent.

    Raises:
      TokenizerError: a file is damaged, or the chat template cannot be used.
    """
    files = tokenizer_files(folder)
    try:
        for file in files:
            if file.suffix == ".json":
                read_json(file)
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
    if any(file.name in _VOCABULARIES or file.suffix == ".tiktoken" for file in files):
        DbrxTokenizer.from_pretrained(folder)
        return
    # Folders as published have no vocabulary: theirs is cl100k_base. The largest ids stand in for it.
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as ranks:
        for byte in range(256):
            print(base64.b64encode(bytes([byte])).decode(), MAX_ID - 256 + byte, file=ranks)
        ranks.flush()
        DbrxTokenizer.from_pretrained(folder, ranks.name)
