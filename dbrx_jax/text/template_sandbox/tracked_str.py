"""TrackedStr: a str that knows which of its characters come from the template."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

TRUSTED, GENERATED = 1, 2  # flags of a character: from the template itself; inside {% generation %}
_RUNS = {TRUSTED: re.compile(rb"[\1\3]+"), GENERATED: re.compile(rb"[\2\3]+")}


class TrackedStr(str):
    """A str with flags for each character: trusted if it is from the template itself and not from its variables.

    The methods below carry the flags along. They give the same text as those of str. Everything else gives a plain
    str, of which nothing is trusted: an operation that is not covered can lose trust, and never gain it. So the
    constructor, which other code may call for a result, trusts nothing unless told.

    Args:
      text: the characters.
      flags: a byte for each character, TRUSTED | GENERATED or less.
    """

    __slots__ = ("_flags",)
    _flags: bytes

    def __new__(cls, text: str = "", flags: bytes | None = None) -> "TrackedStr":
        self = super().__new__(cls, text)
        self._flags = bytes(len(self)) if flags is None else flags
        return self

    def __str__(self) -> "TrackedStr":
        return self

    def __add__(self, other: Any) -> "TrackedStr":
        if not isinstance(other, str) or hasattr(other, "__html__"):  # Markup joins in its own way
            return NotImplemented
        return TrackedStr(str.__add__(self, other), self._flags + flags_of(other))

    def __radd__(self, other: Any) -> "TrackedStr":
        if not isinstance(other, str):
            return NotImplemented
        return TrackedStr(str.__add__(other, self), flags_of(other) + self._flags)

    def __mul__(self, count: Any) -> "TrackedStr":
        return TrackedStr(str.__mul__(self, count), self._flags * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        text = str.__mod__(self, values)
        return formatted(self, "%s", values if isinstance(values, tuple) else (values,), text)

    def __getitem__(self, key: Any) -> "TrackedStr":
        flags = self._flags[key]
        return TrackedStr(str.__getitem__(self, key), flags if isinstance(flags, bytes) else bytes([flags]))

    def __iter__(self) -> Iterator["TrackedStr"]:
        return map(self.__getitem__, range(len(self)))

    def join(self, texts: Iterable[str], /) -> "TrackedStr":
        texts = list(texts)
        return TrackedStr(str.join(self, texts), self._flags.join(map(flags_of, texts)))

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list["TrackedStr"]:  # type: ignore[override]
        return self._parts(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list["TrackedStr"]:  # type: ignore[override]
        return self._parts(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list["TrackedStr"]:  # type: ignore[override]
        return self._parts(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple["TrackedStr", "TrackedStr", "TrackedStr"]:
        before, sep, after = self._parts(str.partition(self, sep))
        return before, sep, after

    def rpartition(self, sep: str, /) -> tuple["TrackedStr", "TrackedStr", "TrackedStr"]:
        before, sep, after = self._parts(str.rpartition(self, sep))
        return before, sep, after

    def replace(self, old: str, new: str, /, count: Any = -1) -> str:
        if not isinstance(old, str) or not old or not isinstance(new, str):
            return str.replace(self, old, new, count)
        return TrackedStr(new, flags_of(new)).join(self.split(old, count))

    def strip(self, chars: str | None = None, /) -> "TrackedStr":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "TrackedStr":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "TrackedStr":
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> "TrackedStr":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> "TrackedStr":
        return self[: len(str.removesuffix(self, suffix))]

    def upper(self) -> str:
        return self._in_other_case(str.upper(self))

    def lower(self) -> str:
        return self._in_other_case(str.lower(self))

    def title(self) -> str:
        return self._in_other_case(str.title(self))

    def capitalize(self) -> str:
        return self._in_other_case(str.capitalize(self))

    def swapcase(self) -> str:
        return self._in_other_case(str.swapcase(self))

    def _parts(self, parts: Iterable[str], gap: int = 0) -> list["TrackedStr"]:
        """Returns parts of this text with their flags. They follow each other after `gap` characters or white space."""
        result, end = [], -gap
        for part in parts:
            start = self.find(part, end + gap)
            end = start + len(part)
            result.append(TrackedStr(part, self._flags[start:end]))
        return result

    def _in_other_case(self, text: str) -> str:
        """Returns the text with the same flags, unless a character became several, as in 'ß'.upper()."""
        return TrackedStr(text, self._flags) if len(text) == len(self) else text


def flags_of(text: str) -> bytes:
    """Returns a text's flags; a plain str has none set."""
    return text._flags if type(text) is TrackedStr else bytes(len(text))


def runs(text: str, flag: int) -> list[tuple[int, int]]:
    """Returns the runs [start, end) of characters that have a flag."""
    return [match.span() for match in _RUNS[flag].finditer(flags_of(text))]


def trusted(text: str) -> TrackedStr:
    """Returns a text with every character trusted."""
    return TrackedStr(text, bytes([TRUSTED]) * len(text))


def generated(text: str) -> str:
    """Returns a text marked as generated by the assistant, unless it is escaped, as in autoescape."""
    if hasattr(text, "__html__"):
        return text
    return TrackedStr(text, bytes(flags | GENERATED for flags in flags_of(text)))


def concat(texts: Iterable[str]) -> str:
    """Joins texts and their flags."""
    return TrackedStr().join(texts)


def formatted(form: TrackedStr, field: str, values: Sequence[Any], text: str) -> str:
    """Returns `text`, the result of formatting, with flags if the format has no other kind of field."""
    literals = form.split(field)
    if len(literals) != len(values) + 1:
        return text
    parts: list[str] = [literals[0]]
    for value, literal in zip(values, literals[1:], strict=True):
        parts += [str(value), literal]
    result = concat(parts)
    return result if result == text else text  # another field, or an escaped percent sign or brace
