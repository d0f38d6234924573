"""Decodes generated tokens to text, as they are generated, and ends it before a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.text.stop_text import StopText, find_first
from dbrx_jax.text.tokenizer import DbrxTokenizer


def stream_text(stream: TokenStream, tokenizer: DbrxTokenizer, stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """Yields the text of a stream of one row, in whole characters, ending before a stop string.

    Special tokens give no text. Text that may begin a stop string is buffered.
    """
    text, num_decoded = StopText(tokenizer.stream(), stop_strings), 0
    for tokens in stream:
        num_new = int(stream.lengths[0]) - num_decoded  # without the padding of a row that ended
        num_decoded += num_new
        yield text.push(tokens[0][:num_new])
        if text.is_stopped:
            return
    yield text.finish()


def completion_text(tokenizer: DbrxTokenizer, ids: Iterable[int], stop_strings: Sequence[str] = ()) -> str:
    """Decodes a row's new tokens to text that ends before the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text[: find_first(text, stop_strings)]
