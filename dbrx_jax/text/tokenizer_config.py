"""Reads a tokenizer's settings, special tokens and chat templates from a checkpoint's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_jax.errors import ConfigError, TokenizerError
from dbrx_jax.files import read_json, read_text
from dbrx_jax.text.encoding import NO_LIMIT
from dbrx_jax.text.vocabulary import special_tokens

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"  # templates besides the default one, NAME.jinja
DEFAULT_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
_OTHER_TOKENS = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_config(folder: Path) -> tuple[Mapping[str, Any], dict[str, int]]:
    """Reads tokenizer_config.json (empty if there is none) and the special tokens.

    Raises:
      TokenizerError: a file is damaged.
    """
    path = folder / CONFIG_FILE
    try:
        config = read_json(path) if path.exists() else {}
        if not isinstance(config, Mapping):
            raise TokenizerError(f"{path}: expected a JSON object")
        return config, special_tokens(folder, config)
    except ConfigError as error:  # an unreadable file
        raise TokenizerError(str(error)) from None


def named_token(config: Mapping[str, Any], key: str, default: str) -> str | None:
    """Reads the text of a named token, which an object may hold; null is none."""
    value = config.get(key, default)
    value = value.get("content") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{CONFIG_FILE}: {key}: expected a text, got {value!r:.40}")
    return value


def other_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str] | None]:
    """Reads what a configuration names besides eos_token and pad_token."""
    tokens: dict[str, str | list[str] | None] = {k: named_token(config, k, "") for k in _OTHER_TOKENS if k in config}
    more = config.get("additional_special_tokens") or []
    if not isinstance(more, list):
        raise TokenizerError(f"{CONFIG_FILE}: additional_special_tokens: expected a list")
    texts = (named_token({"additional_special_tokens": t}, "additional_special_tokens", "") for t in more)
    if more:
        tokens["additional_special_tokens"] = [text for text in texts if text is not None]
    return tokens


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads model_max_length, padding_side and truncation_side, if a configuration has them."""
    result = {}
    limit = config.get("model_max_length")
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 1 <= limit < float("inf"):
            raise TokenizerError(f"{CONFIG_FILE}: model_max_length: expected a number above 0, got {limit!r:.40}")
        result["model_max_length"] = min(int(limit), NO_LIMIT)
    for name in ("padding_side", "truncation_side"):
        if (side := config.get(name)) is not None:
            if side not in ("left", "right"):
                raise TokenizerError(f"{CONFIG_FILE}: {name}: expected left or right, got {side!r:.40}")
            result[name] = side
    return result


def additional_templates(folder: Path) -> list[Path]:
    """Returns the files of the chat templates besides the default one."""
    templates = folder / TEMPLATES_FOLDER
    return sorted(templates.glob("*.jinja")) if templates.is_dir() else []


def chat_templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Reads the chat template, or several by name; files go before tokenizer_config.json.

    Raises:
      TokenizerError: an entry is not a text.
      ConfigError: a file cannot be read.
    """
    named = {path.stem: read_text(path) for path in additional_templates(folder)}
    if (folder / TEMPLATE_FILE).exists():
        named["default"] = read_text(folder / TEMPLATE_FILE)
    if not named:
        template = config.get("chat_template")
        if not isinstance(template, list):
            if template is not None and not isinstance(template, str):
                raise TokenizerError(f"{folder / CONFIG_FILE}: chat_template: expected a text")
            return template
        for entry in template:
            name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str):
                raise TokenizerError(f"{folder / CONFIG_FILE}: chat_template: expected objects with name and template")
            named[name] = text
    return named["default"] if list(named) == ["default"] else named or None
