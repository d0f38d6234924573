"""Checkpoints with a vocabulary of single bytes for the tests of the commands."""

import json

import pytest

from tests.conftest import GOLDEN


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """golden/dense as a Hugging Face folder with a tokenizer. It has 128 positions."""
    from dbrx_jax.text.vocabulary import _byte_characters

    folder = tmp_path_factory.mktemp("source")
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((GOLDEN / "dense" / file).read_bytes())
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(_byte_characters())}))
    (folder / "merges.txt").write_text("")
    special = {260: "<|endoftext|>", 261: "<|im_start|>", 262: "<|im_end|>"}
    added = {str(i): {"content": text} for i, text in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder
