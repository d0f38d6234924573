"""StopText: decodes tokens to text that ends before a stop string."""

from collections.abc import Iterable, Sequence

from dbrx_jax.text.incremental import TextStream


class StopText:
    """Decodes tokens to text as they come, and ends it before the first stop string.

    Text that may begin a stop string is buffered.
    """

    def __init__(self, decoder: TextStream, stop_strings: Sequence[str] = ()):
        self._decoder, self._stop_strings = decoder, stop_strings
        self._buffered = ""
        self.is_stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete."""
        if self.is_stopped:
            return ""
        text = self._buffered + self._decoder.push(ids)
        stop = find_first(text, self._stop_strings)
        self.is_stopped = stop is not None
        safe = stop if stop is not None else len(text) - _partial_match(text, self._stop_strings)
        self._buffered = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """Returns the buffered text, with U+FFFD for bytes that never completed a character."""
        return "" if self.is_stopped else self._buffered + self._decoder.finish()


def find_first(text: str, strings: Sequence[str]) -> int | None:
    """Returns the index of the first of these strings in the text."""
    return min((text.find(s) for s in strings if s in text), default=None)


def _partial_match(text: str, strings: Sequence[str]) -> int:
    """Returns the length of the longest suffix of the text that begins one of the strings."""
    return max((n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
