"""Compares what two checkpoints have beside their weights: configuration, tokenizer, template, generation settings."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dbrx_convert.verify import Difference
from dbrx_jax.checkpoint.folder import CheckpointFolder, and_more
from dbrx_jax.errors import TokenizerError
from dbrx_jax.generation.checkpoint_config import read_generation_config
from dbrx_jax.text.tokenizer import DbrxTokenizer


def compare_settings(a: CheckpointFolder, b: CheckpointFolder) -> Iterator[Difference]:
    """Yields the settings that differ, as loading reads them; the dtype of weights is not one.

    Raises:
      ConfigError, TokenizerError: a file of the generation settings cannot be used.
    """
    configs = [dataclasses.asdict(folder.config) | {"dtype": None} for folder in (a, b)]
    yield from _compare_entries("configuration", *configs)
    settings = [read_generation_config(folder.path).to_dict() for folder in (a, b)]
    yield from _compare_entries("generation configuration", *settings)
    x, y = map(_tokenizer, (a.path, b.path))
    if isinstance(x, DbrxTokenizer) and isinstance(y, DbrxTokenizer):
        yield from _compare_entries("tokenizer", *map(_vocabulary, (x, y)))
        if x.chat_template != y.chat_template:
            texts = (t if isinstance(t, str) else json.dumps(dict(t)) for t in (x.chat_template, y.chat_template))
            yield Difference("chat template", "setting", _first_difference(*texts))
    elif isinstance(x, DbrxTokenizer) or isinstance(y, DbrxTokenizer):
        only, error = ("first", y) if isinstance(x, DbrxTokenizer) else ("second", x)
        yield Difference("tokenizer", "missing", f"only in the {only}: {error}")


def _compare_entries(name: str, x: Mapping[Any, Any], y: Mapping[Any, Any]) -> Iterator[Difference]:
    """Yields a difference for the first entry that differs, with the number of the others."""
    keys = [key for key in {**x, **y} if x.get(key) != y.get(key)]
    if keys:
        values = f"{x.get(keys[0])!r:.80} against {y.get(keys[0])!r:.80}"
        yield Difference(name, "setting", f"{keys[0]}: {values}{and_more(keys)}")


def _tokenizer(folder: Path) -> DbrxTokenizer | str:
    """Returns a folder's tokenizer, or why it has none."""
    try:
        return DbrxTokenizer.from_pretrained(folder)
    except TokenizerError as error:
        return str(error)


def _vocabulary(tokenizer: DbrxTokenizer) -> dict[Any, Any]:
    """Returns the bytes of every id, and the ids of special tokens."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokens = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    return {**special, **tokenizer.special_tokens, **tokens}


def _first_difference(x: str, y: str) -> str:
    """Returns the surroundings of the first character in which two texts differ."""
    pairs = enumerate(zip(x, y, strict=False))
    index = next((i for i, (c, d) in pairs if c != d), min(len(x), len(y)))
    return f"from character {index} on: {x[index : index + 30]!r} against {y[index : index + 30]!r}"
