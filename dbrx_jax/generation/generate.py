"""generate: continues a batch of prompts to the end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.generation.stream import BURST, TokenStream
from dbrx_jax.model.causal_lm import CausalLM


class GenerationOutput(NamedTuple):
    """The result of generate with return_dict_in_generate=True; what was not asked for is None."""

    sequences: np.ndarray  # (B, T + N) int32
    logprobs: np.ndarray | None = None  # (B, N) float32, of the raw logits; NaN after a row's end
    scores: tuple[np.ndarray, ...] | None = None  # N times (B, V) float32, logits after all processing
    logits: tuple[np.ndarray, ...] | None = None  # N times (B, V) float32, as the model gives them


def generate(
    model: CausalLM,
    input_ids: Int[ArrayLike, "B T"] | Sequence[Sequence[int]],
    attention_mask: Int[ArrayLike, "B T"] | None = None,
    *,
    streamer: Any = None,
    **options: Any,
) -> np.ndarray | GenerationOutput:
    """Continues each prompt and returns the prompts as given with their new tokens: (B, T + N).

    N is the number of steps until the last row ended, at most max_new_tokens. A row keeps the token
    that ended it and is padded with the pad token after it. Prompts of unequal length are padded on the left.

    Args:
      streamer: a function that is called with new tokens (B, n) as they are generated, or an object with
        the methods put and end of transformers' streamers.
      **options: see :class:`TokenStream`, all but `burst`. With return_dict_in_generate the result is a
        :class:`GenerationOutput`, with output_logprobs, output_scores and output_logits as requested.

    Raises:
      GenerationError: the arguments do not fit each other or the model.
    """
    stream = TokenStream(model, input_ids, attention_mask, **{"burst": None if streamer is None else BURST, **options})
    put = getattr(streamer, "put", streamer)
    if hasattr(streamer, "put"):
        put(stream.prompt)
    for tokens in stream:
        if put is not None:
            put(tokens)
    if hasattr(streamer, "end"):
        streamer.end()
    if not stream.config.return_dict_in_generate:
        return stream.sequences
    return GenerationOutput(
        stream.sequences,
        stream.logprobs if stream.config.output_logprobs else None,
        tuple(stream.scores) if stream.config.output_scores else None,
        tuple(stream.logits) if stream.config.output_logits else None,
    )
