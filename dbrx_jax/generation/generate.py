"""Runs a TokenStream to its end, for a caller who wants the whole result."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from dbrx_jax.generation.stream import TokenStream

OUTPUTS = ("output_logprobs", "output_scores", "output_logits")  # what return_dict_in_generate adds to the sequences


class GenerationOutput(NamedTuple):
    """The result of generate with return_dict_in_generate=True; what was not asked for is None."""

    sequences: np.ndarray  # (B, T + N) int32
    logprobs: np.ndarray | None = None  # (B, N) float32, of the raw logits; NaN after a row's end
    scores: tuple[np.ndarray, ...] | None = None  # N times (B, V) float32, logits after all processing
    logits: tuple[np.ndarray, ...] | None = None  # N times (B, V) float32, as the model gives them


def run_to_end(stream: TokenStream, streamer: Any = None) -> np.ndarray | GenerationOutput:
    """Generates all tokens; returns the prompts with them (B, T + N), or a GenerationOutput if the options ask for it.

    Args:
      streamer: a function that is called with new tokens (B, n) as they are generated, or an object with
        the methods put and end of transformers' streamers.
    """
    config = stream.config
    unused = [] if config.return_dict_in_generate else [name for name in OUTPUTS if getattr(config, name)]
    if unused:
        warnings.warn(f"{', '.join(unused)}: without return_dict_in_generate=True this has no effect", stacklevel=3)
    put = getattr(streamer, "put", streamer)
    if hasattr(streamer, "put"):
        put(stream.prompt)
    for tokens in stream:
        if put is not None:
            put(tokens)
    if hasattr(streamer, "end"):
        streamer.end()
    if not config.return_dict_in_generate:
        return stream.sequences
    return GenerationOutput(
        stream.sequences,
        stream.logprobs if config.output_logprobs else None,
        tuple(stream.scores) if config.output_scores else None,
        tuple(stream.logits) if config.output_logits else None,
    )
