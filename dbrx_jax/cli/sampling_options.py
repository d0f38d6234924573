"""Sampling options of a command line or of a row of a prompts file: their ranges, and what they are in generate."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dbrx_jax.errors import GenerationError

DEFAULT_NEW_TOKENS = 256  # where neither the user nor the checkpoint gives max_new_tokens
FILTERS = ("top_k", "top_p", "min_p", "typical_p")  # they need sampling


class _Range(NamedTuple):
    """Values that an option takes: numbers from `lowest` to `highest`."""

    description: str
    lowest: float = -math.inf
    highest: float = math.inf
    integer: bool = False

    def contains(self, value: Any) -> bool:
        types = int if self.integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, types):
            return False
        return math.isfinite(value) and self.lowest <= value <= self.highest


_TINY = 5e-324  # the smallest number above 0
_RANGES = {
    "max_new_tokens": _Range("a whole number above 0", 1, integer=True),
    "min_new_tokens": _Range("a whole number from 0", 0, integer=True),
    "temperature": _Range("0 or a number from 0.001", 0),
    "top_k": _Range("a whole number from 0", 0, integer=True),
    "top_p": _Range("a number from 0 to 1", 0, 1),
    "min_p": _Range("a number from 0 to 1", 0, 1),
    "typical_p": _Range("a number above 0, at most 1", _TINY, 1),
    "repetition_penalty": _Range("a number above 0", _TINY),
    "frequency_penalty": _Range("a number"),
    "presence_penalty": _Range("a number"),
    "no_repeat_ngram_size": _Range("a whole number from 0", 0, integer=True),
    "max_time": _Range("a number of seconds above 0", _TINY),
    "num_return_sequences": _Range("a whole number above 0", 1, integer=True),
    "seed": _Range("a whole number from 0 to 4294967295", 0, (1 << 32) - 1, integer=True),
}
NAMES = (*_RANGES, "stop")


def check(options: Mapping[str, Any], prefix: str = "") -> None:
    """Checks the value of each sampling option.

    Args:
      options: values by the names of NAMES; "stop" is a sequence of texts.
      prefix: before the names in messages; "--" shows them as on the command line.

    Raises:
      GenerationError: a value is out of its range.
    """
    for name, value in options.items():
        shown = prefix + (name.replace("_", "-") if prefix == "--" else name)
        if name == "stop":
            if not isinstance(value, list | tuple) or not all(isinstance(s, str) and s for s in value):
                raise GenerationError(f"{shown}: expected texts of at least one character, got {value!r:.80}")
        elif not _RANGES[name].contains(value) or (name == "temperature" and 0 < value < 1e-3):
            raise GenerationError(f"{shown}: expected {_RANGES[name].description}, got {value!r:.80}")


def samples(options: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether these options sample, with the settings of the checkpoint's generation_config.json."""
    temperature = options.get("temperature")
    return bool(checkpoint.get("do_sample")) if temperature is None else temperature > 0


def merge(command: Mapping[str, Any], row: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a row: its own, and the command's where it has none.

    Raises:
      GenerationError: a filter is given without sampling.
    """
    if row.get("temperature") == 0:  # greedy by its own word: the command's filters are not meant
        command = {name: value for name, value in command.items() if name not in FILTERS}
    merged = {**command, **row}
    if not samples(merged, checkpoint) and (given := [name for name in FILTERS if name in merged]):
        names = "--" + given[0].replace("_", "-")
        raise GenerationError(f"{names} draws at random; give --temperature above 0 with it")
    return merged


def max_new_tokens(options: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> int:
    """Returns the limit of new tokens: the user's, else the checkpoint's, else DEFAULT_NEW_TOKENS.

    Raises:
      GenerationError: the checkpoint's is no whole number above 0.
    """
    if "max_new_tokens" in options:
        return options["max_new_tokens"]
    number = checkpoint.get("max_new_tokens")
    if number is None:
        return DEFAULT_NEW_TOKENS
    check({"max_new_tokens": number}, "generation_config.json: ")
    return number


def arguments(options: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the keyword arguments of generate for these options, without seed and num_return_sequences."""
    result = {name: value for name, value in options.items() if name in _RANGES}
    for name in ("seed", "num_return_sequences"):
        result.pop(name, None)
    if (temperature := result.pop("temperature", None)) is not None:
        result |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if options.get("stop"):
        result |= {"stop_strings": tuple(options["stop"]), "tokenizer": tokenizer}
    return result
