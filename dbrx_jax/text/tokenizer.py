"""DbrxTokenizer: converts text to ids and back, and conversations to prompts.

Text never becomes a special token: special ids come from a chat template alone.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken

from dbrx_jax.errors import CheckpointError, ConfigError, TokenizerError
from dbrx_jax.files import read_json, read_text
from dbrx_jax.hub import checkpoint_folder
from dbrx_jax.text.chat_template import DEFAULT_TEMPLATE, check_template, render
from dbrx_jax.text.vocabulary import load_ranks, special_tokens

# cl100k_base splits text so before byte-pair encoding; so does DBRX, even if its tokenizer_class says GPT2.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DEFAULT_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
# Arguments of transformers' apply_chat_template, which are not for the template.
_NOT_VARIABLES = (
    *("tokenize", "return_tensors", "return_dict", "return_assistant_tokens_mask", "continue_final_message"),
    *("padding", "truncation", "max_length", "chat_template", "tokenizer_kwargs"),
)
_OTHER_TOKENS = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")


class DbrxTokenizer:
    """Byte-level BPE tokenizer with special tokens and a chat template.

    Args:
      ranks: token bytes to id, as :func:`dbrx_jax.text.vocabulary.load_ranks` reads them.
      special: special tokens' texts to ids.
      eos_token, pad_token: texts of special tokens, if any.
      chat_template: a Jinja template; ChatML without a system prompt by default.
      other_tokens: texts of other special tokens that the template may name, such as unk_token and
        additional_special_tokens (a list). bos_token is eos_token by default.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special: Mapping[str, int],
        eos_token: str | None = "<|endoftext|>",
        pad_token: str | None = "<|pad|>",
        chat_template: str | None = None,
        other_tokens: Mapping[str, str | list[str] | None] | None = None,
    ):
        if clash := sorted(set(ranks.values()) & set(special.values())):
            raise TokenizerError(f"the id {clash[0]} belongs to a special token and to an entry of the vocabulary")
        self.special_tokens = dict(special)
        self.eos_token_id = special.get(eos_token) if eos_token else None
        self.pad_token_id = special.get(pad_token) if pad_token else None
        self.chat_template = chat_template or DEFAULT_TEMPLATE
        named = {"bos_token": eos_token, "eos_token": eos_token, "pad_token": pad_token, **(other_tokens or {})}
        # By name, as templates see them.
        self.special_tokens_map = {k: v for k, v in named.items() if isinstance(v, list) or (v and v in special)}
        self._special_text = {i: text for text, i in special.items()}
        self._bytes = {i: token for token, i in ranks.items()}
        self._bpe = tiktoken.Encoding("dbrx", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        longest_first = sorted(special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None

    @classmethod
    def from_pretrained(cls, path: str | Path, ranks_file: str | Path | None = None) -> Self:
        """Reads the tokenizer of a checkpoint's folder, offline.

        Args:
          path: a folder with a vocabulary in any published form. Where it has none, the ranks are
            those of cl100k_base from tiktoken's cache.
          ranks_file: a tiktoken ranks file to use instead of the folder's.

        Raises:
          TokenizerError: there is no vocabulary, a file is damaged, or the chat template has a syntax error; the
            message says where.
        """
        try:
            folder = checkpoint_folder(path)
            config, special = _read_config(folder)
            ranks = load_ranks(folder, Path(ranks_file) if ranks_file else None, special)
            template = _chat_template(folder, config)
        except (ConfigError, CheckpointError) as error:  # an unreadable file
            raise TokenizerError(str(error)) from None
        if template is not None:
            try:
                check_template(template)
            except TokenizerError as error:
                raise TokenizerError(f"{folder}: {error}") from None
        eos, pad = (_token_text(config, key, default) for key, default in _DEFAULT_TOKENS.items())
        return cls(ranks, special, eos, pad, template, _other_tokens(config))

    @property
    def vocab_size(self) -> int:
        """The largest id that has text, plus one."""
        return 1 + max(*self._bytes, *self._special_text)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text; adds no special tokens and recognises none."""
        return self._bpe.encode_ordinary(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of token ids; ids without text give none, bytes that are not UTF-8 give U+FFFD."""
        return b"".join(self.token_bytes(int(i), skip_special_tokens) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Returns the bytes of one token, which need not be whole characters."""
        if token_id in self._special_text:
            return b"" if skip_special_tokens else self._special_text[token_id].encode()
        return self._bytes.get(token_id, b"")

    def stream(self) -> "TextStream":
        """Returns a decoder for tokens that come one by one."""
        return TextStream(self)

    def pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Returns `input_ids` and `attention_mask` (B, T) of prompts, padded on the left."""
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self.pad_token_id or 0, np.int32)
        mask = np.zeros(ids.shape, np.int32)
        for row, prompt in enumerate(prompts):
            if prompt:
                ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
        return {"input_ids": ids, "attention_mask": mask}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Returns the token ids of a conversation; special tokens come from the template only.

        Args:
          messages: each with "role", and "content" or what else the template reads, as JSON values.
          add_generation_prompt: end with the beginning of the assistant's message.
          tools: JSON schemas of functions, for templates that describe them.
          documents: each with "title" and "text", for templates that quote them.
          template_kwargs: more variables of the template.

        Raises:
          TokenizerError: an argument is not one of these but of transformers', a message has no role, or the template
            failed or refused the conversation.
        """
        if unsupported := [name for name in _NOT_VARIABLES if name in template_kwargs]:
            raise TokenizerError(
                f"apply_chat_template has no argument {unsupported[0]}: it returns a list of token ids"
            )
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TokenizerError(f"message {number}: expected an object with a role (a text)")
        variables = template_kwargs | {
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text, trusted = render(self.chat_template, variables, self.special_tokens_map)
        ids: list[int] = []
        end = 0
        for match in self._special_matches(text, trusted):
            ids += [*self.encode(text[end : match.start()]), self.special_tokens[match[0]]]
            end = match.end()
        return ids + self.encode(text[end:])

    def _special_matches(self, text: str, trusted: Iterable[tuple[int, int]]) -> Iterator[re.Match[str]]:
        """Yields special tokens that lie within a trusted run [start, end)."""
        if self._special_pattern:
            for start, end in trusted:
                yield from self._special_pattern.finditer(text, start, end)


def stop_tokens(folder: Path) -> tuple[tuple[int, ...], int | None]:
    """Returns the stop ids (eos and <|im_end|>) and the pad id of a folder with a tokenizer_config.json.

    Raises:
      TokenizerError: the file is damaged.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return (), None
    config, special = _read_config(folder)
    eos, pad = (special.get(_token_text(config, key, default) or "") for key, default in _DEFAULT_TOKENS.items())
    ids = (i for i in (eos, special.get("<|im_end|>")) if i is not None)
    return tuple(dict.fromkeys(ids)), pad


class TextStream:
    """Decodes tokens to text as they come; buffers bytes until they are whole characters."""

    def __init__(self, tokenizer: DbrxTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete; special tokens give none."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(int(i), True) for i in ids))

    def finish(self) -> str:
        """Returns U+FFFD for bytes that never completed a character."""
        return self._decoder.decode(b"", final=True)


def _read_config(folder: Path) -> tuple[Mapping[str, Any], dict[str, int]]:
    """Reads tokenizer_config.json (empty if there is none) and the special tokens."""
    path = folder / "tokenizer_config.json"
    try:
        config = read_json(path) if path.exists() else {}
        if not isinstance(config, Mapping):
            raise TokenizerError(f"{path}: expected a JSON object")
        return config, special_tokens(folder, config)
    except ConfigError as error:  # an unreadable file
        raise TokenizerError(str(error)) from None


def _token_text(config: Mapping[str, Any], key: str, default: str) -> str | None:
    value = config.get(key, default)
    value = value.get("content") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"tokenizer_config.json: {key}: expected a text, got {value!r:.40}")
    return value


def _other_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str] | None]:
    """Reads what a configuration names besides eos_token and pad_token."""
    tokens: dict[str, str | list[str] | None] = {k: _token_text(config, k, "") for k in _OTHER_TOKENS if k in config}
    more = config.get("additional_special_tokens") or []
    if not isinstance(more, list):
        raise TokenizerError("tokenizer_config.json: additional_special_tokens: expected a list")
    texts = (_token_text({"additional_special_tokens": t}, "additional_special_tokens", "") for t in more)
    if more:
        tokens["additional_special_tokens"] = [text for text in texts if text is not None]
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [t.get("template") for t in template if isinstance(t, Mapping) and t.get("name") == "default"]
        template = named[0] if named else None
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template: expected a text")
    return template
