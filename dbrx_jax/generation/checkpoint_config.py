"""Reads the options of generation that a checkpoint brings."""

from pathlib import Path

from dbrx_jax.generation_config import FILE, GenerationConfig
from dbrx_jax.text.tokenizer import stop_tokens


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads generation_config.json, or without one config.json's token ids; ids that it lacks are the tokenizer's.

    Raises:
      ConfigError: a file is damaged, or has a value that cannot be used.
      TokenizerError: tokenizer_config.json is damaged.
    """
    if (folder / FILE).exists():
        config = GenerationConfig.from_file(folder)
    else:
        config = GenerationConfig.from_model_config(folder / "config.json")
    eos, pad = stop_tokens(folder)
    ids = {"eos_token_id": config.eos_token_id or eos, "pad_token_id": config.pad_token_id}
    return config.replace({**ids, "pad_token_id": pad} if ids["pad_token_id"] is None else ids)
