"""TextStream: decodes tokens to text as they come."""

import codecs
from collections.abc import Callable, Iterable


class TextStream:
    """Decodes tokens to text as they come; buffers bytes until they are whole characters.

    Args:
      token_bytes: returns the bytes of a token; its second argument skips special tokens.
    """

    def __init__(self, token_bytes: Callable[[int, bool], bytes]):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete; special tokens give none."""
        return self._decoder.decode(b"".join(self._token_bytes(int(i), True) for i in ids))

    def finish(self) -> str:
        """Returns U+FFFD for bytes that never completed a character."""
        return self._decoder.decode(b"", final=True)
