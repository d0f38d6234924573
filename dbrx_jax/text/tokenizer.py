"""DbrxTokenizer: converts text to ids and back, and conversations to prompts.

Text never becomes a special token, unless the caller asks for it: special ids come from a chat template.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken

from dbrx_jax.errors import CheckpointError, ConfigError, TokenizerError
from dbrx_jax.hub import checkpoint_folder
from dbrx_jax.text.chat_template import DEFAULT_TEMPLATE, RenderedText, check_template
from dbrx_jax.text.conversation import (
    as_batch,
    check_chat_arguments,
    check_generation_tag,
    check_json_schemas,
    check_variables,
    render_conversation,
)
from dbrx_jax.text.encoding import NO_LIMIT, BatchEncoding, EncodingOptions, check_keywords, encode_rows, id_list
from dbrx_jax.text.incremental import TextStream
from dbrx_jax.text.save import tokenizer_files, write_files
from dbrx_jax.text.template_sandbox.tracked_str import TRUSTED, TrackedStr, runs
from dbrx_jax.text.tokenizer_config import (
    DEFAULT_TOKENS,
    chat_templates,
    named_token,
    other_tokens,
    read_config,
    settings,
)
from dbrx_jax.text.vocabulary import SPLIT_PATTERN, load_ranks, num_bytes, token_from_text, token_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_CHAT_ARGUMENTS = (
    *("tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "chat_template")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def _named_token(name: str) -> property:
    """Returns a property: the text of the special token with a name such as eos_token, or None."""

    def get(self: "DbrxTokenizer") -> str | None:
        text = self.special_tokens_map.get(name)
        return text if isinstance(text, str) else None

    def set_text(self: "DbrxTokenizer", text: str | None) -> None:
        if text is None:
            self.special_tokens_map.pop(name, None)
            return
        if text not in self.special_tokens:
            raise TokenizerError(f"{name}: {text!r:.60} is no special token; there are {_listed(self.special_tokens)}")
        self.special_tokens_map[name] = text

    return property(get, set_text)


def _named_token_id(name: str) -> property:
    """Returns a property: the id of the special token with a name such as eos_token, or None."""

    def get(self: "DbrxTokenizer") -> int | None:
        return self.special_tokens.get(getattr(self, name))

    def set_id(self: "DbrxTokenizer", token_id: int | None) -> None:
        text = None if token_id is None else self._special_text.get(token_id, str(token_id))
        setattr(self, name, text)

    return property(get, set_id)


class DbrxTokenizer:
    """Byte-level BPE tokenizer with special tokens and a chat template; its methods have transformers' names.

    Args:
      ranks: token bytes to id, as :func:`dbrx_jax.text.vocabulary.load_ranks` reads them.
      special: special tokens' texts to ids.
      eos_token, pad_token: texts of special tokens, if any.
      chat_template: a Jinja template, or several by name; ChatML without a system prompt by default.
      other_tokens: texts of other special tokens that the template may name, such as unk_token and
        additional_special_tokens (a list). bos_token is eos_token by default.

    Attributes:
      special_tokens: texts of all special tokens to ids.
      special_tokens_map: texts of those with a name such as eos_token, as templates see them.
      bos_token, eos_token, pad_token, unk_token: texts, or None; each has an id, as eos_token_id.
      chat_template: may be replaced.
      padding_side: "left", which generation needs, unless tokenizer_config.json says otherwise.
      truncation_side: the side where tokens are cut off, "right" by default.
      model_max_length: of tokenizer_config.json, else 10^30, as in transformers.
      name_or_path: where it was loaded from.
    """

    bos_token, eos_token, pad_token, unk_token = map(_named_token, _NAMED)
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = map(_named_token_id, _NAMED)

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special: Mapping[str, int],
        eos_token: str | None = "<|endoftext|>",
        pad_token: str | None = "<|pad|>",
        chat_template: str | Mapping[str, str] | None = None,
        other_tokens: Mapping[str, str | list[str] | None] | None = None,
    ):
        if clash := sorted(set(ranks.values()) & set(special.values())):
            raise TokenizerError(f"the id {clash[0]} belongs to a special token and to an entry of the vocabulary")
        self.special_tokens = dict(special)
        self.chat_template = chat_template or DEFAULT_TEMPLATE
        self.padding_side, self.truncation_side = "left", "right"
        self.model_max_length = NO_LIMIT
        self.name_or_path = ""
        named = {"bos_token": eos_token, "eos_token": eos_token, "pad_token": pad_token, **(other_tokens or {})}
        self.special_tokens_map = {k: v for k, v in named.items() if isinstance(v, list) or (v and v in special)}
        self._special_text = {i: text for text, i in special.items()}
        self._ranks = dict(ranks)
        self._bytes = {i: token for token, i in ranks.items()}
        self._bpe = tiktoken.Encoding("dbrx", pat_str=SPLIT_PATTERN, mergeable_ranks=self._ranks, special_tokens={})
        self._special_pattern = _pattern_of(special)

    @classmethod
    def from_pretrained(cls, path: str | Path, ranks_file: str | Path | None = None, **options: Any) -> Self:
        """Reads the tokenizer of a checkpoint's folder, offline.

        Args:
          path: a folder with a vocabulary in any published form. Where it has none, the ranks are
            those of cl100k_base from tiktoken's cache.
          ranks_file: a tiktoken ranks file to use instead of the folder's.
          **options: model_max_length, padding_side, truncation_side, chat_template, eos_token, pad_token, bos_token
            or unk_token instead of the folder's.

        Raises:
          TokenizerError: there is no vocabulary, a file is damaged, the chat template has a syntax error, or an option
            is unknown; the message says where.
        """
        check_keywords("from_pretrained", options, ("ranks_file", *_SETTINGS, *_NAMED))
        try:
            folder = checkpoint_folder(path)
            config, special = read_config(folder)
            ranks = load_ranks(folder, Path(ranks_file) if ranks_file else None, special)
            templates = chat_templates(folder, config)
        except (ConfigError, CheckpointError) as error:  # an unreadable file
            raise TokenizerError(str(error)) from None
        for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
            try:
                check_template(template)
            except TokenizerError as error:
                raise TokenizerError(f"{folder}: {error}") from None
        eos, pad = (named_token(config, key, default) for key, default in DEFAULT_TOKENS.items())
        tokenizer = cls(ranks, special, eos, pad, templates, other_tokens(config))
        chosen = {name: value for name, value in options.items() if name in (*_SETTINGS, *_NAMED)}
        for name, value in (settings(config) | chosen).items():
            setattr(tokenizer, name, value)
        tokenizer.name_or_path = str(path)
        return tokenizer

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> tuple[str, ...]:
        """Writes files that :meth:`from_pretrained` and transformers' AutoTokenizer load; returns their paths.

        A new folder appears with all files, or not at all. In a folder that exists, files of the same names are
        replaced.

        Raises:
          TokenizerError: the folder cannot be written, or has files of another tokenizer that would not be replaced.
        """
        check_keywords("save_pretrained", options, ("save_directory",))
        fixed = {name: getattr(self, name) for name in _SETTINGS if name != "chat_template"}
        named = self.special_tokens_map
        files = tokenizer_files(self._ranks, self.special_tokens, named, self.chat_template, fixed)
        return write_files(save_directory, files, self._ranks)

    def __len__(self) -> int:
        """The size of a model's vocabulary that has every id: the largest id that has text, plus one."""
        return 1 + max(*self._bytes, *self._special_text)

    @property
    def vocab_size(self) -> int:
        """The same as len(tokenizer): published vocabularies of DBRX list the special tokens as entries."""
        return len(self)

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens that have a name, as eos_token; special_tokens has all."""
        texts = [[v] if isinstance(v, str) else v for v in self.special_tokens_map.values()]
        return list(dict.fromkeys(text for several in texts for text in several))

    @property
    def all_special_ids(self) -> list[int | None]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Returns all tokens, as :meth:`convert_ids_to_tokens` shows them, with their ids."""
        return {token_text(token): rank for token, rank in self._ranks.items()} | self.special_tokens

    def __call__(
        self, text: str | Sequence[str], *, allowed_special: str | Collection[str] = (), **options: Any
    ) -> BatchEncoding:
        """Returns input_ids and attention_mask of a text, or of several.

        Args:
          text: a text, or a list of texts. Special tokens in it are text, except those that a chat template wrote: a
            text of `apply_chat_template(…, tokenize=False)` knows which these are.
          allowed_special: special tokens to recognise anywhere in the text, or "all", as in tiktoken.
          **options: fields of :class:`dbrx_jax.text.encoding.EncodingOptions`: padding, truncation, max_length,
            return_tensors, …. Other arguments of transformers are accepted where they ask for nothing.

        Raises:
          TokenizerError: an option is unknown or does not fit; the message says what to use.
        """
        is_batch = not isinstance(text, str)
        texts: list[Any] = list(text) if isinstance(text, list | tuple) else [text]
        rows = [self._encode_text(one, allowed_special) for one in texts]
        return encode_rows(rows, self._options("tokenizer", options), is_batch)

    def encode(self, text: str, *, allowed_special: str | Collection[str] = (), **options: Any) -> Any:
        """Returns the token ids of a text: a list, or an array (1, T) with return_tensors.

        Arguments and errors are those of calling the tokenizer. No special token is added.
        """
        ids = self._encode_text(text, allowed_special)
        return encode_rows([ids], self._options("encode", options), False)["input_ids"] if options else ids

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """Returns the text of token ids; ids without text give none, bytes that are not UTF-8 give U+FFFD.

        Args:
          token_ids: an id, a list of ids, or an array (T,).
        """
        check_keywords("decode", options, ("skip_special_tokens",))
        tokens = (self.token_bytes(i, skip_special_tokens) for i in id_list(token_ids))
        return b"".join(tokens).decode("utf-8", errors="replace")

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Returns the text of each row of a list or an array (B, T)."""
        rows = np.asarray(sequences) if hasattr(sequences, "__array__") else sequences
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    def tokenize(self, text: str) -> list[str | None]:
        """Returns the tokens of a text, as :meth:`convert_ids_to_tokens` shows them."""
        return self.convert_ids_to_tokens(self.encode(text))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Returns the token of an id, or those of a list or array; None for an id without text.

        A token has a printable character for each byte, as in GPT-2's files: "Ġthe" for " the". Special tokens are
        as they are.
        """
        if isinstance(ids, int | np.integer):
            token = self._bytes.get(int(ids))
            return self._special_text.get(int(ids)) if token is None else token_text(token)
        return [self.convert_ids_to_tokens(i) for i in id_list(ids)]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Returns the id of a token as :meth:`convert_ids_to_tokens` shows it, or of several; None if there is none."""
        if isinstance(tokens, str):
            token = token_from_text(tokens)
            return self.special_tokens.get(tokens, None if token is None else self._ranks.get(token))
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Returns the bytes of one token, which need not be whole characters."""
        if token_id in self._special_text:
            return b"" if skip_special_tokens else self._special_text[token_id].encode()
        return self._bytes.get(token_id, b"")

    def stream(self) -> TextStream:
        """Returns a decoder for tokens that come one by one."""
        return TextStream(self.token_bytes)

    def pad(self, prompts: Sequence[Sequence[int]], **options: Any) -> BatchEncoding:
        """Returns `input_ids` and `attention_mask` (B, T), arrays, of rows of token ids; options are as in a call."""
        options = {"padding": True, "return_tensors": "np"} | options
        return encode_rows([id_list(row) for row in prompts], self._options("pad", options))

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Returns the template that :meth:`apply_chat_template` uses with these arguments.

        Args:
          chat_template: a template, or the name of one of several.
          tools: if there are any, the template called "tool_use" is the default.

        Raises:
          TokenizerError: there are several templates, and none is the default.
        """
        if isinstance(self.chat_template, str):
            return chat_template or self.chat_template
        names = [chat_template] if chat_template else ["tool_use", "default"] if tools is not None else ["default"]
        for name in names:
            if name in self.chat_template:
                return self.chat_template[name]
        if chat_template:
            return chat_template
        raise TokenizerError(f"chat_template: give a name, because none is the default: {_listed(self.chat_template)}")

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Returns the token ids of a conversation, or of several; special tokens come from the template only.

        Args:
          conversation: messages, each with "role", and "content" or what else the template reads, as JSON values; or
            a list of such lists.
          tools: JSON schemas of functions, for templates that describe them.
          documents: each with "title" and "text", for templates that quote them.
          chat_template: a template to use instead of the tokenizer's, or the name of one of several.
          add_generation_prompt: end with the beginning of the assistant's message.
          continue_final_message: end after the content of the last message, which the model then continues.
          tokenize: False returns the text. The tokenizer gives it the same ids, also as a part of a longer text made
            by +, slices and other methods of str; a formatted copy forgets which special tokens are the template's.
          return_dict: return a :class:`BatchEncoding` with attention_mask.
          return_assistant_tokens_mask: add assistant_masks, 1 for tokens inside `{% generation %}`.
          **options: padding, truncation, max_length and return_tensors, as in a call of the tokenizer, which
            tokenizer_kwargs may hold too; all others are variables of the template.

        Raises:
          TokenizerError: arguments do not fit each other, a message has no role, or the template failed or refused
            the conversation.
        """
        check_chat_arguments(
            return_dict, tokenize, return_assistant_tokens_mask, continue_final_message, add_generation_prompt
        )
        check_json_schemas(tools)
        template = self.get_chat_template(chat_template, tools)
        if return_assistant_tokens_mask:
            check_generation_tag(template)
        layout = {name: options.pop(name) for name in _CHAT_ARGUMENTS if name in options}
        layout = {"truncation": False, **layout, **(tokenizer_kwargs or {})}
        check_variables(template, options, _CHAT_ARGUMENTS)
        arguments = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        batch, is_batch = as_batch(conversation)
        rendered = [
            render_conversation(template, m, options | arguments, self.special_tokens_map, continue_final_message)
            for m in batch
        ]
        if not tokenize:
            texts = [one.tracked() for one in rendered]
            return texts if is_batch else texts[0]
        rows = [self._encode_runs(one.text, one.trusted, self._special_pattern) for one in rendered]
        more = {}
        if return_assistant_tokens_mask:
            more["assistant_masks"] = [self._generated(*pair) for pair in zip(rendered, rows, strict=True)]
        encoding = encode_rows(rows, self._options("apply_chat_template", layout), is_batch, more)
        return encoding if return_dict else encoding["input_ids"]

    def _options(self, caller: str, keywords: Mapping[str, Any]) -> EncodingOptions:
        own = {"model_max_length": self.model_max_length, "pad_token_id": self.pad_token_id}
        sides = {"padding_side": self.padding_side, "truncation_side": self.truncation_side}
        return EncodingOptions.from_keywords(caller, keywords, **own, **sides)

    def _encode_text(self, text: str, allowed_special: str | Collection[str]) -> list[int]:
        if not isinstance(text, str):
            advice = "; apply_chat_template takes messages" if isinstance(text, Mapping) else ""
            raise TokenizerError(f"expected a text, or a list of texts, got {text!r:.40}{advice}")
        if allowed_special:
            every = allowed_special == "all"
            allowed = self.special_tokens if every or isinstance(allowed_special, str) else list(allowed_special)
            unknown = [t for t in allowed if t not in self.special_tokens]
            if unknown or (isinstance(allowed_special, str) and not every):
                raise TokenizerError(
                    f'allowed_special: expected "all" or a list of {_listed(self.special_tokens)}, '
                    f"got {allowed_special!r:.60}"
                )
            return self._encode_runs(text, [(0, len(text))], _pattern_of(allowed))
        if isinstance(text, TrackedStr):
            return self._encode_runs(text, runs(text, TRUSTED), self._special_pattern)
        return self._bpe.encode_ordinary(text)

    def _encode_runs(self, text: str, trusted: Iterable[tuple[int, int]], special: re.Pattern[str] | None) -> list[int]:
        """Returns the ids of a text, with the special tokens that lie within trusted runs [start, end)."""
        ids: list[int] = []
        end = 0
        for match in (m for run in trusted for m in special.finditer(text, *run)) if special else ():
            ids += [*self._bpe.encode_ordinary(text[end : match.start()]), self.special_tokens[match[0]]]
            end = match.end()
        return ids + self._bpe.encode_ordinary(text[end:])

    def _generated(self, rendered: RenderedText, ids: list[int]) -> list[int]:
        """Returns 1 for each token with a byte in a generated run, else 0."""
        ends = np.cumsum([len(self.token_bytes(i)) for i in ids])
        mask = np.zeros(len(ids), int)
        for run in rendered.generated:
            start, stop = (num_bytes(rendered.text[:position]) for position in run)
            mask |= (ends > start) & (ends - np.diff(ends, prepend=0) < stop)
        return mask.tolist()


def stop_tokens(folder: Path) -> tuple[tuple[int, ...], int | None]:
    """Returns the stop ids (eos and <|im_end|>) and the pad id of a folder with a tokenizer_config.json.

    Raises:
      TokenizerError: the file is damaged.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return (), None
    config, special = read_config(folder)
    eos, pad = (special.get(named_token(config, key, default) or "") for key, default in DEFAULT_TOKENS.items())
    ids = (i for i in (eos, special.get("<|im_end|>")) if i is not None)
    return tuple(dict.fromkeys(ids)), pad


def _pattern_of(special: Collection[str]) -> re.Pattern[str] | None:
    """Returns a pattern of special tokens, longest first; None if there are none."""
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:8])
