"""Decodes generated tokens to text, as they are generated, and ends it before a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.text.tokenizer import DbrxTokenizer


def stream_text(stream: TokenStream, tokenizer: DbrxTokenizer, stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """Yields the text of a stream of one row, in whole characters, ending before a stop string.

    Special tokens give no text. Text that may begin a stop string is buffered.
    """
    decoder, buffered, num_decoded = tokenizer.stream(), "", 0
    for tokens in stream:
        num_new = int(stream.lengths[0]) - num_decoded  # without the padding of a row that ended
        num_decoded += num_new
        buffered += decoder.push(tokens[0][:num_new])
        if (stop := _find(buffered, stop_strings)) is not None:
            yield buffered[:stop]
            return
        safe = len(buffered) - _partial_match(buffered, stop_strings)
        yield buffered[:safe]
        buffered = buffered[safe:]
    yield buffered + decoder.finish()


def completion_text(tokenizer: DbrxTokenizer, ids: Iterable[int], stop_strings: Sequence[str] = ()) -> str:
    """Decodes a row's new tokens to text that ends before the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text[: _find(text, stop_strings)]


def _find(text: str, strings: Sequence[str]) -> int | None:
    """Returns the index of the first of these strings in the text."""
    return min((text.find(s) for s in strings if s in text), default=None)


def _partial_match(text: str, strings: Sequence[str]) -> int:
    """Returns the length of the longest suffix of the text that begins one of the strings."""
    return max((n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
