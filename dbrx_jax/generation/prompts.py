"""Checks prompts, removes their padding, and finds how many tokens may follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.inputs import check_ids, pad_rows, same_shape

NEW_TOKENS = 256  # at most, where neither the caller nor the checkpoint says how many


def unpadded(
    model: CausalLM,
    input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
    attention_mask: Int[ArrayLike, "B T"] | None,
    pad_token_id: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the prompts as given (B, T), and each row's tokens without padding.

    Raises:
      GenerationError: they are not token ids of this model, a row is empty, or the mask has another shape.
    """
    input_ids, attention_mask = pad_rows(input_ids, attention_mask, pad_token_id, left=True)
    ids = np.asarray(check_ids(input_ids, model.config.vocab_size), np.int32)
    if attention_mask is None:
        return ids, list(ids)
    mask = np.asarray(same_shape("attention_mask", attention_mask, ids)) != 0
    rows = [row[is_token] for row, is_token in zip(ids, mask, strict=True)]
    for index, row in enumerate(rows):
        if not len(row):
            raise GenerationError(f"attention_mask: row {index} has no token; a prompt needs at least one")
    return ids, rows


def new_token_limit(config: GenerationConfig, options: Mapping[str, Any], width: int, longest: int, limit: int) -> int:
    """Returns the most new tokens of a row: max_new_tokens, else what max_length leaves, else NEW_TOKENS.

    Args:
      options: those of the caller, to name the one that is at fault.
      width, longest: tokens of the padded prompts and of the longest without its padding.
      limit: positions of the model.

    Raises:
      GenerationError: prompt and new tokens do not fit the model, or max_length is not above the prompt's.
    """
    available = limit - longest
    if available < 1:
        raise GenerationError(
            f"input_ids: a prompt of {longest} tokens fills the model's {limit} positions; shorten it"
        )
    if config.max_new_tokens is not None:
        new_tokens, name = config.max_new_tokens, "max_new_tokens"
    elif config.max_length is not None:
        new_tokens, name = config.max_length - width, "max_length"
        if new_tokens < 1:
            raise GenerationError(
                f"max_length: {config.max_length} leaves no room behind prompts of {width} tokens; raise it, or use "
                "max_new_tokens"
            )
    else:
        return min(NEW_TOKENS, available)
    if new_tokens <= available:
        return new_tokens
    if name not in options:  # the checkpoint's own limit is an upper bound, not a wish
        return available
    value = getattr(config, name)
    raise GenerationError(
        f"{name}: {value} with a prompt of {longest} tokens is beyond the model's {limit} positions; "
        f"ask for at most {available} new tokens"
    )
