"""Options of generation as the user gives them, on the command line or in a row of a prompts file."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dbrx_jax.errors import GenerationError

if TYPE_CHECKING:
    from dbrx_jax.generation_config import GenerationConfig

MISSPELT = 0.92  # similarity of names; "top-p" and "seeds" are less like an option's
MAX_SEED = (1 << 32) - 1
# Of GenerationConfig: these are for callers in Python.
OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_logprobs")
# Names of other libraries' options that a row may well have for a field of its own.
NAMES_OF_DATA = ("n", "inputs", "logprobs")


def read_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the options among these values with GenerationConfig's names, checked; None is not given.

    "stop" is stop_strings, and "temperature" decides do_sample too: 0 is greedy, above 0 samples.

    Args:
      prefix: before the names in messages; "--" shows them as on the command line.

    Raises:
      GenerationError: a value cannot be used.
    """
    from dbrx_jax.generation_config import GenerationConfig

    names = [field.name for field in dataclasses.fields(GenerationConfig) if field.name not in OUTPUTS]
    given = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("stop") is not None:
        if "stop_strings" in given:
            raise GenerationError("stop and stop_strings are the same option; give one of them")
        given["stop_strings"] = values["stop"]
    if (temperature := given.get("temperature")) is not None:
        if temperature == 0 and type(temperature) in (int, float) and not given.get("do_sample"):
            del given["temperature"]
            given["do_sample"] = False
        given.setdefault("do_sample", True)
    for name, value in given.items():
        try:
            GenerationConfig(**{"do_sample": True, name: value})
        except GenerationError as error:
            typed = "stop" if name == "stop_strings" and "stop" in values else name
            message = str(error).removeprefix(name)
            if name == "temperature":  # with advice for callers in Python
                message = f"{message.partition(';')[0]}; 0 is greedy"
            raise GenerationError(f"{_typed(typed, prefix)}{message}") from None
    return given


def check_seed(seed: Any, name: str = "seed") -> None:
    """Raises GenerationError unless the seed is None or a number of 32 bits."""
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise GenerationError(f"{name}: expected a whole number from 0 to {MAX_SEED}, got {seed!r:.40}")


def refuse_foreign_options(row: Mapping[str, Any]) -> None:
    """Raises GenerationError if a row has an option of another library's, or a misspelt one, which would do nothing."""
    from dbrx_jax.generation_config import NOT_SUPPORTED, GenerationConfig

    options = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in row:
        near = difflib.get_close_matches(name, options, 1, cutoff=MISSPELT)
        if near and name != near[0] and name not in NOT_SUPPORTED:
            raise GenerationError(f"{name}: there is no such option; did you mean {near[0]}?")
    names = [name for name in NOT_SUPPORTED if name in row and name not in (*NAMES_OF_DATA, "stop")]
    GenerationConfig().replace({name: row[name] for name in names})


def merge(
    checkpoint: "GenerationConfig", command: Mapping[str, Any], row: Mapping[str, Any] | None = None
) -> "GenerationConfig":
    """Returns the checkpoint's options, with the command's over them, and the row's over these.

    Raises:
      GenerationError: an option needs sampling, and this is greedy.
    """
    from dbrx_jax.generation_config import SAMPLING_OPTIONS

    row = row or {}
    config = checkpoint.replace(command).replace(row)
    if not config.do_sample:
        # Of a row that is greedy by its own word, the command's options of sampling are not meant.
        given = row if "do_sample" in row else {**command, **row}
        for name, off in {**SAMPLING_OPTIONS, "num_return_sequences": 1}.items():
            if given.get(name) not in (None, off):
                prefix = "" if name in row else "--"
                raise GenerationError(
                    f"{_typed(name, prefix)} draws at random; give {prefix}temperature above 0 with it"
                )
    return config


def as_typed(error: GenerationError, command: Mapping[str, Any], row: Mapping[str, Any]) -> GenerationError:
    """Returns the error with the option that it begins with as the user typed it."""
    name, colon, rest = str(error).partition(":")
    if not colon or name in row or name not in command:
        return error
    return GenerationError(f"{_typed(name, '--')}:{rest}")


def _typed(name: str, prefix: str) -> str:
    return prefix + (name.replace("_", "-") if prefix == "--" else name)
