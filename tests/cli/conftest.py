"""Checkpoints with a vocabulary of single bytes for the tests of the commands."""

import pytest

from tests.conftest import GOLDEN, write_byte_vocabulary


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """golden/dense as a Hugging Face folder with a tokenizer. It has 128 positions."""
    folder = tmp_path_factory.mktemp("source")
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((GOLDEN / "dense" / file).read_bytes())
    write_byte_vocabulary(folder)
    return folder
