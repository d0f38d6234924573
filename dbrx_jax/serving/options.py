"""Options of generation from the fields of a request, over the checkpoint's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import SAMPLING_OPTIONS, GenerationConfig
from dbrx_jax.serving.engine_interface import MakeConstraint
from dbrx_jax.serving.errors import ApiError, bad_request, context_length_error
from dbrx_jax.serving.protocol import Body
from dbrx_jax.serving.settings import Settings

MAX_STOP_CHARACTERS = 1000  # of one stop string
MAX_DIGITS = 12  # of a token id
GREEDY_BELOW = 1e-3  # temperatures so low are greedy: logits divided by them may be infinite
# Options under the engine's names, as they begin its messages, and the fields they come from.
FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
    "eos_token_id": "stop_token_ids",
}


def check_bounds(body: Body, settings: Settings) -> None:
    """Raises ApiError for a field beyond the server's bounds."""
    _at_most("n", body.n or 1, settings.max_n)
    stops = _stop_strings(body)
    _at_most("stop", len(stops), settings.max_stop)
    if any(not stop for stop in stops):
        raise bad_request("stop: a stop string is empty", "stop")
    _at_most("stop", max(map(len, stops), default=0), MAX_STOP_CHARACTERS)
    _at_most("stop_token_ids", len(body.stop_token_ids or ()), settings.max_logit_bias)
    _at_most("logit_bias", len(body.logit_bias or ()), settings.max_logit_bias)
    for name, ids in (("logit_bias", body.logit_bias or ()), ("stop_token_ids", body.stop_token_ids or ())):
        for token in ids:
            if len(str(token)) > MAX_DIGITS or not str(token).isdecimal() or int(token) >= settings.vocab_size:
                raise bad_request(f"{name}: {token!r:.40} is no token id below {settings.vocab_size}", name)
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: only with stream", "stream_options")


def check_top_logprobs(name: str, count: int | None, settings: Settings) -> None:
    """Raises ApiError for too many of the most probable tokens."""
    _at_most(name, count or 0, settings.max_top_logprobs)


def _at_most(name: str, value: int, maximum: int) -> None:
    if value > maximum:
        raise bad_request(f"{name}: at most {maximum}, got {value}", name)


def token_limit(
    num_prompt_tokens: int, n: int, given: int | None, default: int | None, field: str, settings: Settings
) -> int:
    """Returns the number of new tokens for a prompt.

    Args:
      n: completions of the prompt.
      given: the request's number; more than fits the model is an error.
      default: without one, at most so many; None is what fits the model and the cache.
      field: of the request that has the number.

    Raises:
      ApiError: prompt and new tokens do not fit the model.
    """
    remaining = settings.max_model_len - num_prompt_tokens
    if remaining < 1:
        raise context_length_error(
            f"the prompt has {num_prompt_tokens} tokens, and the model takes {settings.max_model_len - 1} and one new",
            field,
        )
    if given is None:
        in_cache = settings.cache_blocks // n * settings.cache_block - num_prompt_tokens
        return min(remaining, max(in_cache, 1), remaining if default is None else default)
    if given > remaining:
        raise context_length_error(
            f"{field}: the prompt's {num_prompt_tokens} tokens and {given} new ones are more than the model's "
            f"{settings.max_model_len}",
            field,
        )
    return given


def generation_config(body: Body, max_new_tokens: int, settings: Settings) -> GenerationConfig:
    """Returns the options of generation: the checkpoint's, and the request's over them.

    The temperature is 1 where neither has one, as OpenAI's API has it.

    Raises:
      ApiError: a value cannot be used.
    """
    defaults = settings.defaults
    if (body.min_tokens or 0) > max_new_tokens:
        raise bad_request(f"min_tokens: {body.min_tokens} are more than max_tokens, {max_new_tokens}", "min_tokens")
    temperature = next((t for t in (body.temperature, defaults.temperature) if t is not None), 1.0)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": body.min_tokens,
        "stop_strings": _stop_strings(body) or None,
        "num_return_sequences": body.n,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "logit_bias": body.logit_bias or None,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "top_p": body.top_p,
        "min_p": body.min_p,
    }
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if temperature < GREEDY_BELOW:
        changes |= {"do_sample": False, **dict.fromkeys(SAMPLING_OPTIONS)}
    else:
        changes |= {"do_sample": True, "temperature": temperature}
    stop_ids = () if body.ignore_eos else defaults.eos_token_id
    changes["eos_token_id"] = tuple(dict.fromkeys((*stop_ids, *(body.stop_token_ids or ()))))
    try:
        return defaults.replace(changes)
    except GenerationError as error:
        raise as_bad_request(error) from None


def as_bad_request(error: GenerationError) -> ApiError:
    """Returns the error of an option under its name in the API."""
    name, colon, rest = str(error).partition(":")
    if not colon or not name.isidentifier():
        return bad_request(str(error))
    name = FIELDS.get(name, name)
    return bad_request(f"{name}:{rest}", name)


def _stop_strings(body: Body) -> Sequence[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def constraint(body: Body, make_constraint: MakeConstraint | None, call: Mapping[str, Any] | None = None) -> Any:
    """Returns the constraint that a request asks for, or None.

    Args:
      call: the JSON schema of a call of a tool, if the answer must be one.

    Raises:
      ApiError: it asks for several, or for one that cannot be made.
    """
    found = _constraints(body)
    if call is not None:
        found.append(("tool_choice", "json_schema", call))
    if not found:
        return None
    if len(found) > 1:
        raise bad_request(f"{' and '.join(field for field, _, _ in found)}: give one of them", found[0][0])
    field, kind, value = found[0]
    if make_constraint is None:
        raise bad_request(f"{field}: not supported", field)
    try:
        return make_constraint(kind, value)
    except GenerationError as error:
        raise bad_request(f"{field}: {error}", field) from None


def _constraints(body: Body) -> list[tuple[str, str, Any]]:
    """Returns the field, the kind and the value of each constraint in a request."""
    found: list[tuple[str, str, Any]] = []
    if (form := body.response_format) is not None and form.type != "text":
        if form.type == "json_object":
            found.append(("response_format", "json_object", None))
        else:
            schema = (form.json_schema or {}).get("schema")
            if not isinstance(schema, dict | bool):
                raise bad_request("response_format.json_schema.schema: expected a JSON schema", "response_format")
            found.append(("response_format", "json_schema", schema))
    outputs = body.structured_outputs
    given: tuple[tuple[str, str, Any], ...] = (
        ("guided_json", "json_schema", _schema("guided_json", body.guided_json)),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("structured_outputs", "json_schema", outputs and _schema("structured_outputs", outputs.json_)),
        ("structured_outputs", "regex", outputs and outputs.regex),
        ("structured_outputs", "choice", outputs and outputs.choice),
    )
    if outputs is not None and outputs.json_object:
        found.append(("structured_outputs", "json_object", None))
    return found + [(field, kind, value) for field, kind, value in given if value is not None]


def _schema(field: str, schema: Any) -> Any:
    """Returns a JSON schema, which may have been given as a text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except ValueError:
        raise bad_request(f"{field}: expected a JSON schema", field) from None


def seed(body: Body) -> int | None:
    """Returns the request's seed in the engine's 32 bits."""
    return None if body.seed is None else body.seed % (1 << 32)


def template_options(add_generation_prompt: bool | None, continue_final_message: bool | None) -> tuple[bool, bool]:
    """Returns whether the template begins the answer, and whether the last message goes on instead.

    Raises:
      ApiError: both are asked for.
    """
    if continue_final_message and add_generation_prompt:
        raise bad_request("continue_final_message: only with add_generation_prompt false", "continue_final_message")
    if continue_final_message:
        return False, True
    return add_generation_prompt is not False, False
