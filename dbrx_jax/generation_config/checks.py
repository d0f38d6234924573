"""Checks the values of generation options, and converts each to the one type that the library uses."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dbrx_jax.errors import GenerationError

MIN_TEMPERATURE = 1e-3  # logits divided by much less are infinite
MAX_ID = 1 << 31


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float | np.floating)) and math.isfinite(value)


def _whole(minimum: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if _is_int(value) and value >= MAX_ID:
            raise GenerationError(f"{name}: expected at most {MAX_ID - 1}, got {value!r:.40}")
        if not _is_int(value) or value < minimum:
            bound = "above 0" if minimum == 1 else "of at least 0"
            raise GenerationError(f"{name}: expected a whole number {bound}, got {value!r:.40}")
        return int(value)

    return check


def _above_zero(name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise GenerationError(f"{name}: expected a number above 0, got {value!r:.40}")
    return float(value)


def _temperature(name: str, value: Any) -> float:
    """Checks a temperature; 0 is for greedy decoding alone, as GenerationConfig knows."""
    if not (_is_number(value) and value == 0) and _above_zero(name, value) < MIN_TEMPERATURE:
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


# A function of name and value for each option; it raises GenerationError for a value that cannot be used.
CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
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
