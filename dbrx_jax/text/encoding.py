"""Rows of token ids as the tokenizer returns them: truncated, padded, in lists or arrays, by transformers' names."""

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from dbrx_jax.errors import TokenizerError

NO_LIMIT = int(1e30)  # model_max_length of a tokenizer that names none, as in transformers

# Arguments of transformers' tokenizers that have no effect here, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True, False),  # DBRX adds none
    "clean_up_tokenization_spaces": (False, None),
    "is_split_into_words": (False,),
    "legacy_format": (False, None),
    "push_to_hub": (False,),
    "return_offsets_mapping": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_token_type_ids": (False, None),
    "split_special_tokens": (True,),  # text stays text
    "stride": (0,),
    "text_pair": (None,),
    "text_pair_target": (None,),
    "text_target": (None,),
    "trust_remote_code": (True, False),  # no code of a checkpoint runs
    "use_fast": (True, False),
    "verbose": (True, False),
}


class BatchEncoding(dict[str, Any]):
    """A dict with input_ids and attention_mask, which are attributes too; `model.generate(**encoding)` takes it."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the encoding has no {name}; it has {', '.join(self)}")
        return self[name]


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """Truncation, padding and form of encoded rows.

    Attributes:
      padding: True or "longest" pads to the longest row, "max_length" to max_length.
      truncation: cut rows to max_length tokens; None does if max_length is given and padding is not.
      max_length: tokens of a row; model_max_length by default.
      pad_to_multiple_of: padded rows have a multiple of this many tokens.
      padding_side, truncation_side: "left" or "right".
      return_tensors: "np" or "jax" for int32 arrays (B, T); None for lists.
      return_attention_mask: False leaves out attention_mask.
      return_length: add length, a list with each row's number of tokens, padding included.
      model_max_length, pad_token_id: the tokenizer's.

    Raises:
      TokenizerError: an option has an unknown value, or two do not fit each other.
    """

    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str = "left"
    truncation_side: str = "right"
    return_tensors: str | None = None
    return_attention_mask: bool | None = None
    return_length: bool = False
    model_max_length: int = NO_LIMIT
    pad_token_id: int | None = None

    @classmethod
    def from_keywords(cls, caller: str, keywords: Mapping[str, Any], **defaults: Any) -> Self:
        """Returns the options that a caller's user gave, over defaults; raises TokenizerError for unknown ones."""
        known = {field.name for field in dataclasses.fields(cls)} - {"model_max_length", "pad_token_id"}
        given = {name: value for name, value in keywords.items() if name in known}
        check_keywords(caller, keywords, known)
        if given.get("padding_side", 0) is None:
            del given["padding_side"]
        return cls(**(defaults | given))

    def __post_init__(self) -> None:
        _check_choice("padding", self.padding, (False, True, "longest", "max_length", "do_not_pad"))
        _check_choice(
            "truncation", self.truncation, (None, False, True, "longest_first", "only_first", "do_not_truncate")
        )
        _check_choice("return_tensors", self.return_tensors, (None, "np", "jax"), "; torch.from_numpy takes np arrays")
        for name in ("padding_side", "truncation_side"):
            _check_choice(name, getattr(self, name), ("left", "right"))
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise TokenizerError(f"{name}: expected a whole number above 0, got {value!r:.40}")
        if self.padding == "max_length" and self._limit == NO_LIMIT:
            raise TokenizerError(
                'padding="max_length": needs max_length=, because the tokenizer has no model_max_length'
            )
        multiple = self.pad_to_multiple_of
        if self.pads and multiple and self.truncates and self._limit < NO_LIMIT and self._limit % multiple:
            raise TokenizerError(f"max_length: {self._limit} is not a multiple of pad_to_multiple_of, {multiple}")

    @property
    def pads(self) -> bool:
        return self.padding not in (False, "do_not_pad")

    @property
    def truncates(self) -> bool:
        if self.truncation is None:
            return self.max_length is not None and not self.pads
        return self.truncation not in (False, "do_not_truncate")

    @property
    def _limit(self) -> int:
        return self.model_max_length if self.max_length is None else self.max_length

    def truncated(self, row: Sequence[int]) -> list[int]:
        """Returns the part of a row that stays."""
        if not self.truncates or len(row) <= self._limit:
            return list(row)
        return list(row[: self._limit] if self.truncation_side == "right" else row[-self._limit :])

    def padded_length(self, longest: int) -> int:
        """Returns the tokens to which rows are padded; longer rows stay as they are."""
        if not self.pads:
            return 0
        length = self._limit if self.padding == "max_length" else longest
        return length + -length % (self.pad_to_multiple_of or 1)

    def padded(self, row: list[int], length: int, value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if self.padding_side == "left" else row + padding


def encode_rows(
    rows: Sequence[Sequence[int]],
    options: EncodingOptions,
    is_batch: bool = True,
    more: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> BatchEncoding:
    """Truncates and pads rows of token ids.

    Args:
      rows: token ids.
      options: what to do with them.
      is_batch: False for the row of a single text, which is returned without a batch dimension, except in arrays.
      more: numbers beside the ids, by name; padded with 0.

    Raises:
      TokenizerError: arrays are asked for, and the rows are not of one length.
    """
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **(more or {})}
    if options.return_attention_mask is False:
        del columns["attention_mask"]
    encoding = BatchEncoding()
    for name, column in columns.items():
        cut = [options.truncated(row) for row in column]
        length = options.padded_length(max(map(len, cut), default=0))
        value = (options.pad_token_id or 0) if name == "input_ids" else 0
        encoding[name] = [options.padded(row, length, value) for row in cut]
    lengths = [len(row) for row in encoding["input_ids"]]
    for name in columns:
        if options.return_tensors is not None:
            encoding[name] = _array(encoding[name], options.return_tensors)
        elif not is_batch:
            encoding[name] = encoding[name][0]
    return BatchEncoding(encoding, length=lengths) if options.return_length else encoding


def check_keywords(caller: str, keywords: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises TokenizerError for a keyword that is not known, unless its value asks for nothing."""
    known = sorted(known)
    for name, value in keywords.items():
        choices = _WITHOUT_EFFECT.get(name, ())
        if name in known or any(type(value) is type(choice) and value == choice for choice in choices):
            continue
        if name in _WITHOUT_EFFECT:
            raise TokenizerError(f"{caller}: {name}={value!r:.40} is not supported")
        near = difflib.get_close_matches(name, known, 1)
        advice = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise TokenizerError(f"{caller}: no argument {name}; {advice}")


def id_list(token_ids: Any) -> list[int]:
    """Returns an id, a list of ids or an array (T,) as a list."""
    try:
        if hasattr(token_ids, "__array__"):
            token_ids = np.asarray(token_ids).tolist()
        return [operator.index(i) for i in ([token_ids] if isinstance(token_ids, int) else token_ids)]
    except TypeError:
        raise TokenizerError(f"expected token ids of one row, got {token_ids!r:.40}; batch_decode takes rows") from None


def _check_choice(name: str, value: Any, choices: tuple[Any, ...], advice: str = "") -> None:
    if not isinstance(value, bool | str | None) or value not in choices:
        raise TokenizerError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r:.40}{advice}")


def _array(rows: list[list[int]], kind: str) -> Any:
    """Returns rows of one length as an int32 array (B, T)."""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise TokenizerError(
            f"return_tensors: the rows have {lengths[0]} to {lengths[-1]} tokens; padding=True makes them equal"
        )
    array = np.array(rows, np.int32).reshape(len(rows), *lengths or [0])
    if kind == "np":
        return array
    import jax.numpy as jnp

    return jnp.asarray(array)
