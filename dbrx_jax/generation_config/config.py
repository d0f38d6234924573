"""GenerationConfig: the options of generation that a checkpoint brings, with transformers' names and meanings."""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dbrx_jax.errors import ConfigError, GenerationError
from dbrx_jax.files import location, read_json
from dbrx_jax.generation_config.checks import CHECKS
from dbrx_jax.generation_config.not_supported import NOT_SUPPORTED, is_neutral

FILE = "generation_config.json"
# Options that need do_sample, with the value that turns each off.
SAMPLING_OPTIONS: Mapping[str, float] = {
    "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0
}  # fmt: skip
_SPECIAL_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
# Options of a call of generate that a configuration cannot hold; here to be suggested for misspelt ones.
CALL_OPTIONS = (
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer", "seed",
    "batch_size", "batch_invariant", "cache_length", "cache_dtype",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class GenerationConfig:
    """Options of generation. None turns an option off, as do the values named below.

    docs/generation.md describes each. Values are checked on construction.

    Raises:
      GenerationError: a value is of the wrong type or out of range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and new tokens
    min_new_tokens: int | None = None
    min_length: int | None = None
    max_time: float | None = None  # seconds
    stop_strings: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float | None = None  # 1; without do_sample also 0
    top_k: int | None = None  # 0
    top_p: float | None = None  # 1
    min_p: float | None = None  # 0
    typical_p: float | None = None  # 1
    epsilon_cutoff: float | None = None  # 0 or 1
    eta_cutoff: float | None = None  # 0 or 1
    renormalize_logits: bool = False
    repetition_penalty: float | None = None  # 1
    frequency_penalty: float | None = None  # 0
    presence_penalty: float | None = None  # 0
    no_repeat_ngram_size: int | None = None  # 0
    logit_bias: Mapping[int, float] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    num_return_sequences: int | None = None  # 1
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None  # never used: prompts come as ids
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_logprobs: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = field.default if value is None else CHECKS[field.name](field.name, value)
            object.__setattr__(self, field.name, value)  # the dataclass is frozen
        if self.do_sample and self.temperature == 0:
            raise GenerationError("temperature: expected a number above 0, got 0; use do_sample=False")

    def __repr__(self) -> str:
        options = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        given = (f"{field.name}={value!r}" for field, value in options if value != field.default)
        return f"GenerationConfig({', '.join(given)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the options that are not at their defaults, as a generation_config.json holds them."""
        fields = dataclasses.fields(self)
        options = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        if self.sequence_bias is not None:
            options["sequence_bias"] = [[list(ids), bias] for ids, bias in self.sequence_bias.items()]
        return json.loads(json.dumps(options))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes a configuration from options by name.

        Raises:
          GenerationError: an option does not exist or is not supported, or its value cannot be used.
        """
        return cls().replace(data)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a ``generation_config.json``, or the one in a folder.

        Unknown entries are ignored; one that transformers would apply and this library cannot gives a warning.

        Raises:
          ConfigError: the file is missing, no JSON object, or has a value that cannot be used.
        """
        path = location(path)
        path = path / FILE if path.is_dir() else path
        data = read_json(path)
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: expected a JSON object")
        known = {}
        for name, value in data.items():
            if name in _FIELDS:
                known[name] = _without_negative_ids(value) if name in _SPECIAL_TOKENS else value
            elif name in NOT_SUPPORTED and not is_neutral(name, value):
                warnings.warn(f"{path}: {name} {value!r:.40} is not applied: {NOT_SUPPORTED[name][1]}", stacklevel=2)
        try:
            return cls(**known)
        except GenerationError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_model_config(cls, path: Path) -> Self:
        """Reads the token ids of a ``config.json``, which stand for a missing generation_config.json.

        Raises:
          ConfigError: the file is missing or damaged, or an id is no whole number.
        """
        data = read_json(path)
        ids = {name: _without_negative_ids(data[name]) for name in _SPECIAL_TOKENS if name in data}
        try:
            return cls(**ids)
        except GenerationError as error:
            raise ConfigError(f"{path}: {error}") from None

    def replace(self, options: Mapping[str, Any]) -> Self:
        """Returns a copy with other values; a limit of one kind replaces that of the other.

        Raises:
          GenerationError: as in :meth:`from_dict`.
        """
        changes = {}
        for name, value in options.items():
            if name in _FIELDS:
                changes[name] = value
            elif not (name in NOT_SUPPORTED and is_neutral(name, value)):
                raise GenerationError(_refusal(name))
        for words in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            given = [word for word in words if changes.get(word) is not None]
            if len(given) == 1:
                changes |= {word: None for word in words if word not in given}
        return dataclasses.replace(self, **changes)


_FIELDS = {field.name for field in dataclasses.fields(GenerationConfig)}


def _refusal(name: str) -> str:
    if name in NOT_SUPPORTED:
        return f"{name}: {NOT_SUPPORTED[name][1]}"
    names = [*_FIELDS, *CALL_OPTIONS, *NOT_SUPPORTED]
    near = difflib.get_close_matches(name, names, 1)
    return f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")


def _without_negative_ids(value: Any) -> Any:
    """Removes -1, which some files have for "none"; transformers never generates it either."""
    if isinstance(value, list):
        return [v for v in value if not (isinstance(v, int) and v < 0)]
    return None if isinstance(value, int) and not isinstance(value, bool) and value < 0 else value
