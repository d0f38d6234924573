"""Text from generated tokens: as they come, and cut before a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from dbrx_jax.generation.generate import TokenStream
from dbrx_jax.text.tokenizer import DbrxTokenizer


def stream_text(stream: TokenStream, tokenizer: DbrxTokenizer, stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """The text of a stream of one row, in whole characters, ending before a stop string.

    Special tokens give no text. Text that may begin a stop string is buffered.
    """
    decoder, buffered = tokenizer.stream(), ""
    done = 0
    for tokens in stream:
        new = int(stream.lengths[0]) - done  # without what fills a row that ended
        done += new
        buffered += decoder.push(tokens[0][:new])
        if (cut := _find(buffered, stop_strings)) is not None:
            yield buffered[:cut]
            return
        keep = _begun(buffered, stop_strings)
        yield buffered[: len(buffered) - keep]
        buffered = buffered[len(buffered) - keep :]
    yield buffered + decoder.finish()


def completion_text(tokenizer: DbrxTokenizer, ids: Iterable[int], stop_strings: Sequence[str] = ()) -> str:
    """The text of a row's new tokens, cut before the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text[: _find(text, stop_strings)]


def _find(text: str, strings: Sequence[str]) -> int | None:
    found = [text.find(s) for s in strings if s in text]
    return min(found) if found else None


def _begun(text: str, strings: Sequence[str]) -> int:
    """Counts the last characters of the text that may begin a stop string."""
    return max((n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
