"""GenerationConfig: the options of generation that a checkpoint brings, with transformers' names and meanings."""

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from dbrx_jax.errors import ConfigError, GenerationError
from dbrx_jax.files import location, read_json

FILE = "generation_config.json"
MIN_TEMPERATURE = 1e-3  # logits divided by much less are infinite
MAX_ID = 1 << 31
# Options that need do_sample, with the value that turns each off.
SAMPLING_OPTIONS: Mapping[str, float] = {
    "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0
}  # fmt: skip
_SPECIAL_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


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
    temperature: float | None = None  # 1
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
            value = field.default if value is None else _CHECKS[field.name](field.name, value)
            object.__setattr__(self, field.name, value)  # the dataclass is frozen

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
            elif name in NOT_SUPPORTED and not _is_neutral(name, value):
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
            elif not (name in NOT_SUPPORTED and _is_neutral(name, value)):
                raise GenerationError(_refusal(name))
        for words in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            given = [word for word in words if changes.get(word) is not None]
            if len(given) == 1:
                changes |= {word: None for word in words if word not in given}
        return dataclasses.replace(self, **changes)


_FIELDS = {field.name for field in dataclasses.fields(GenerationConfig)}

# Options of transformers that are not supported: values that change nothing, and what to do instead.
_BEAMS = "beam search is not implemented; do_sample with num_return_sequences gives several continuations"
_ASSISTED = "assisted generation is not implemented; plain decoding gives the same tokens"
_ENCODER = "DBRX has no encoder"
_CONTRASTIVE = "contrastive search is not implemented; use do_sample with top_k, top_p or typical_p"
_CACHE = "the cache is of one kind; cache_length and cache_dtype change it"
NOT_SUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "length_penalty": ((1,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "low_memory": ((False,), _BEAMS),
    "penalty_alpha": ((0,), _CONTRASTIVE),
    "dola_layers": ((), "DoLa decoding is not implemented; use repetition_penalty"),
    "guidance_scale": ((1,), "classifier-free guidance is not implemented; logits_processor takes a function"),
    "negative_prompt_ids": ((), "classifier-free guidance is not implemented; logits_processor takes a function"),
    "negative_prompt_attention_mask": ((), "classifier-free guidance is not implemented"),
    "prefix_allowed_tokens_fn": ((), "give logits_processor a JAX function that returns -inf for other tokens"),
    "watermarking_config": ((), "watermarks are not implemented; logits_processor takes a function"),
    "remove_invalid_values": ((False,), "logits that are not finite end generation with an error"),
    "token_healing": ((False,), "token healing is not implemented; end the prompt at a whole token"),
    "forced_bos_token_id": ((), _ENCODER + "; put the token at the end of the prompt"),
    "decoder_start_token_id": ((), _ENCODER + "; put the token at the beginning of the prompt"),
    "encoder_repetition_penalty": ((1,), _ENCODER + "; repetition_penalty covers the prompt"),
    "encoder_no_repeat_ngram_size": ((0,), _ENCODER + "; no_repeat_ngram_size covers the prompt"),
    "encoder_outputs": ((), _ENCODER),
    "use_cache": ((True,), "generation always uses the cache"),
    "cache_implementation": ((), _CACHE),
    "cache_config": ((), _CACHE),
    "past_key_values": ((), _CACHE),
    "return_legacy_cache": ((False,), _CACHE),
    "prefill_chunk_size": ((), "prompts always run in chunks; their lengths are chosen by the prompt's"),
    "assistant_model": ((), _ASSISTED),
    "prompt_lookup_num_tokens": ((), _ASSISTED),
    "max_matching_ngram_size": ((), _ASSISTED),
    "assistant_early_exit": ((), _ASSISTED),
    "num_assistant_tokens": ((20,), _ASSISTED),
    "num_assistant_tokens_schedule": (("constant",), _ASSISTED),
    "assistant_confidence_threshold": ((0.4,), _ASSISTED),
    "assistant_lookbehind": ((10,), _ASSISTED),
    "target_lookbehind": ((10,), _ASSISTED),
    "assistant_tokenizer": ((), _ASSISTED),
    "is_assistant": ((False,), _ASSISTED),
    "compile_config": ((), "generation is always compiled"),
    "disable_compile": ((False,), "generation is always compiled"),
    "output_attentions": ((False,), "attention is computed in blocks and never stored"),
    "output_hidden_states": ((False,), "call model(ids, output_hidden_states=True) with the result's sequences"),
    "synced_gpus": ((False,), "all processes of a mesh always run in step"),
    "use_model_defaults": ((), "a generation_config replaces the checkpoint's, but for its token ids"),
    "custom_generate": ((), "code from the hub is never run"),
    "inputs_embeds": ((), "prompts are token ids: input_ids"),
    "inputs": ((), "the prompts' name is input_ids"),
    "position_ids": ((), "positions follow from attention_mask"),
    "token_type_ids": ((), "DBRX has no token types"),
    "best_of": ((1,), "use num_return_sequences with output_logprobs"),
    "n": ((1,), "its name here is num_return_sequences"),
    "max_tokens": ((), "its name here is max_new_tokens"),
    "min_tokens": ((), "its name here is min_new_tokens"),
    "stop": ((), "its name here is stop_strings"),
    "stop_token_ids": ((), "its name here is eos_token_id"),
    "logprobs": ((), "its name here is output_logprobs"),
    "trust_remote_code": ((False,), "code from the hub is never run"),
}


def _is_neutral(name: str, value: Any) -> bool:
    """Returns whether a value of an option that is not supported changes nothing in transformers."""
    return value is None or any(type(value) in (type(v), float) and value == v for v in NOT_SUPPORTED[name][0])


def _refusal(name: str) -> str:
    if name in NOT_SUPPORTED:
        return f"{name}: {NOT_SUPPORTED[name][1]}"
    names = [*_FIELDS, *CALL_OPTIONS, *NOT_SUPPORTED]
    near = difflib.get_close_matches(name, names, 1)
    return f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")


# Options of a call of generate that a configuration cannot hold; here to be suggested for misspelt ones.
CALL_OPTIONS = (
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer", "seed",
    "batch_size", "batch_invariant", "cache_length", "cache_dtype",
)  # fmt: skip


def _without_negative_ids(value: Any) -> Any:
    """Removes -1, which some files have for "none"; transformers never generates it either."""
    if isinstance(value, list):
        return [v for v in value if not (isinstance(v, int) and v < 0)]
    return None if isinstance(value, int) and not isinstance(value, bool) and value < 0 else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float | np.floating)) and math.isfinite(value)


def _whole(minimum: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not _is_int(value) or not minimum <= value < MAX_ID:
            bound = "above 0" if minimum == 1 else "of at least 0"
            raise GenerationError(f"{name}: expected a whole number {bound}, got {value!r:.40}")
        return int(value)

    return check


def _above_zero(name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise GenerationError(f"{name}: expected a number above 0, got {value!r:.40}")
    return float(value)


def _temperature(name: str, value: Any) -> float:
    if _above_zero(name, value) < MIN_TEMPERATURE:
        raise GenerationError(f"{name}: expected at least {MIN_TEMPERATURE}, got {value}; or do_sample=False")
    return float(value)


def _between(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not low <= value <= high:
            raise GenerationError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r:.40}")
        return float(value)

    return check


def _typical_p(name: str, value: Any) -> float:
    if _between(0, 1)(name, value) == 0:
        raise GenerationError(f"{name}: expected a number above 0 and at most 1, got 0")
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise GenerationError(f"{name}: expected True or False, got {value!r:.40}")
    return bool(value)


def _token_id(name: str, value: Any) -> int:
    if not _is_int(value) or not 0 <= value < MAX_ID:
        raise GenerationError(f"{name}: expected a token id as a whole number, got {value!r:.40}")
    return int(value)


def _sequence(name: str, value: Any, of: str) -> Iterable[Any]:
    if isinstance(value, np.ndarray) or hasattr(value, "tolist"):
        value = value.tolist()  # arrays of NumPy, JAX and torch
    if not isinstance(value, Sequence | set | frozenset) or isinstance(value, str | bytes):
        raise GenerationError(f"{name}: expected {of}, got {value!r:.40}")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_token_id(name, i) for i in _sequence(name, value, "a list of token ids")))


def _one_or_more_ids(name: str, value: Any) -> tuple[int, ...]:
    is_scalar = not hasattr(value, "__len__") or isinstance(value, str) or getattr(value, "shape", None) == ()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return (_token_id(name, value),) if is_scalar else _token_ids(name, value)


def _ids_in_order(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(_token_id(name, i) for i in _sequence(name, value, "lists of token ids"))
    if not ids:
        raise GenerationError(f"{name}: expected lists of at least one token id, got an empty one")
    return ids


def _id_lists(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids_in_order(name, ids) for ids in _sequence(name, value, "lists of token ids"))


def _bias_number(name: str, value: Any) -> float:
    if (not _is_int(value) and not isinstance(value, float | np.floating)) or math.isnan(value) or value == math.inf:
        raise GenerationError(f"{name}: expected a number for each token, got {value!r:.40}")
    return float(value)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise GenerationError(f"{name}: expected numbers by token id, got {value!r:.40}")
    keys = {key: int(key) if isinstance(key, str) and key.isdecimal() else key for key in value}  # JSON has texts
    return {_token_id(name, keys[key]): _bias_number(name, bias) for key, bias in value.items()}


def _sequence_bias(name: str, value: Any) -> dict[tuple[int, ...], float]:
    pairs: Any = value.items() if isinstance(value, Mapping) else _sequence(name, value, "pairs of ids and a number")
    pairs = [tuple(pair) if isinstance(pair, Sequence) else (pair,) for pair in pairs]
    if not all(len(pair) == 2 for pair in pairs):
        raise GenerationError(f"{name}: expected pairs of token ids and a number, got {value!r:.40}")
    return {_ids_in_order(name, ids): _bias_number(name, bias) for ids, bias in pairs}


def _length_penalty(name: str, value: Any) -> tuple[int, float]:
    pair = tuple(_sequence(name, value, "a number of tokens and a factor"))
    if len(pair) != 2:
        raise GenerationError(f"{name}: expected a number of tokens and a factor, got {value!r:.40}")
    return _whole(0)(name, pair[0]), _above_zero(name, pair[1])


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(_sequence(name, value, "texts"))
    if not all(isinstance(s, str) and s for s in strings):
        raise GenerationError(f"{name}: expected texts that are not empty, got {value!r:.40}")
    return strings


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_return_sequences"), _whole(1)),
    **dict.fromkeys(("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size"), _whole(0)),
    **dict.fromkeys(("max_time", "repetition_penalty"), _above_zero),
    **dict.fromkeys(("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"), _between(0, 1)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _between(-2, 2)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _token_ids),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _one_or_more_ids),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _token_id),
    **dict.fromkeys(("do_sample", "renormalize_logits", "return_dict_in_generate"), _boolean),
    **dict.fromkeys(("output_scores", "output_logits", "output_logprobs"), _boolean),
    "temperature": _temperature,
    "typical_p": _typical_p,
    "logit_bias": _logit_bias,
    "sequence_bias": _sequence_bias,
    "bad_words_ids": _id_lists,
    "exponential_decay_length_penalty": _length_penalty,
    "stop_strings": _strings,
}
