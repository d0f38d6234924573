"""Log-probabilities in the two forms of OpenAI's API."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from dbrx_jax.engine.request import TokenLogprobs
from dbrx_jax.text.tokenizer import DbrxTokenizer

MIN_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not


def token_name(tokenizer: DbrxTokenizer, token: int) -> str:
    """Returns the text of a token; one for each token, because clients use them as keys."""
    data = tokenizer.token_bytes(token)
    if not data:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionLogprobs:
    """Makes the log-probabilities of /v1/completions: four lists with an entry for each token.

    text_offset counts characters from the beginning of the choice's text.
    """

    def __init__(self, tokenizer: DbrxTokenizer):
        self._tokenizer, self._offset = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def prompt(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """Returns the entries of an echoed prompt, of which the first has no log-probability."""
        entries = self._entries(tokens, logprobs, skip_special_tokens=False)
        self._offset += len(self._decoder.decode(b"", final=True))
        return entries

    def tokens(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Returns the entries of new tokens."""
        return self._entries([entry.token for entry in logprobs], logprobs, skip_special_tokens=True)

    def _entries(
        self, tokens: Iterable[int], logprobs: Sequence[TokenLogprobs | None], skip_special_tokens: bool
    ) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, logprobs, strict=True):
            lists["tokens"].append(token_name(self._tokenizer, token))
            lists["token_logprobs"].append(None if entry is None else max(entry.logprob, MIN_LOGPROB))
            lists["top_logprobs"].append(None if entry is None else self._top(entry))
            lists["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token, skip_special_tokens)))
        return lists

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Returns the most probable tokens, and the token itself."""
        pairs = (*entry.top, (entry.token, entry.logprob))
        return {token_name(self._tokenizer, token): max(logprob, MIN_LOGPROB) for token, logprob in pairs}


def chat_logprobs(tokenizer: DbrxTokenizer, logprobs: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    """Returns the log-probabilities of /v1/chat/completions: an object for each token."""
    return [
        {
            **_chat_token(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in logprobs
    ]


def _chat_token(tokenizer: DbrxTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {
        "token": token_name(tokenizer, token),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(data) if data else None,
    }
