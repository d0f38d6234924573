"""Quantisation formats, and their choice for each part of a model."""

import dataclasses
from typing import Literal, cast

from dbrx_jax.errors import QuantizationError

Kind = Literal["int8", "int4", "fp8"]
GROUPS = (32, 64, 128)  # group sizes to choose from
FORMATS = ("int8", "fp8", "int4", *(f"int4-{g}" for g in GROUPS))
PRESETS = ("int8", "int4", *(f"int4-{g}" for g in GROUPS), "fp8")
PARTS = ("experts", "attention", "embedding", "head")


@dataclasses.dataclass(frozen=True)
class Format:
    """Storage format of quantised weights.

    Args:
      kind: "int8" (-127 to 127), "int4" (-7 to 7) or "fp8" (float8_e4m3fn).
      group: int4 only: largest number of weights along the contraction that share a scale; None: per output channel.
    """

    kind: Kind
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Parses a text such as "int8" or "int4-64".

        Raises:
          QuantizationError: it is not one of FORMATS.
        """
        if text not in FORMATS:
            raise QuantizationError(f"quantization: expected {join_words(FORMATS)}, got {text!r:.40}")
        kind, _, group = text.partition("-")
        return cls(cast(Kind, kind), int(group) if group else None)

    def __str__(self) -> str:
        return self.kind if self.group is None else f"{self.kind}-{self.group}"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The format of each part of a model; None keeps the model's dtype, as routers and norms always do."""

    experts: Format | None = None
    attention: Format | None = None
    embedding: Format | None = None
    head: Format | None = None

    @classmethod
    def parse(cls, text: "str | Quantization | None") -> "Quantization | None":
        """Parses a text: "int8", "int4" (experts in groups of 128, the rest int8; also "int4-32", "int4-64",
        "int4-128"), "fp8" (the embedding int8), or parts such as "experts=int4-64,attention=int8", in which
        "int4" is per output channel. A Quantization or None is returned unchanged.

        Raises:
          QuantizationError: the text is none of these.
        """
        if text is None or isinstance(text, Quantization):
            return text
        int8 = Format("int8")
        if text == "fp8":
            return cls(Format("fp8"), Format("fp8"), int8, Format("fp8"))
        if text in PRESETS:
            return cls(Format.parse("int4-128" if text == "int4" else text), int8, int8, int8)
        parts: dict[str, Format] = {}
        for assignment in str(text).split(","):
            part, _, format = (s.strip() for s in assignment.partition("="))
            if part not in PARTS or part in parts or format not in FORMATS:
                raise QuantizationError(
                    f'quantization: expected {join_words(PRESETS)}, or parts such as "experts=int4-64,attention=int8" '
                    f"({', '.join(PARTS)}; {', '.join(FORMATS)}), got {str(text)!r:.80}"
                )
            parts[part] = Format.parse(format)
        return cls(**parts)

    def __str__(self) -> str:
        """Returns a text that :meth:`parse` accepts."""
        for text in PRESETS:
            if self == Quantization.parse(text):
                return text
        return ",".join(f"{part}={getattr(self, part)}" for part in PARTS if getattr(self, part) is not None)

    def format_of(self, name: str) -> Format | None:
        """Returns the format of a parameter, given its dotted name."""
        part = part_of(name)
        return None if part is None else getattr(self, part)


def part_of(name: str) -> str | None:
    """Returns the part of the model that a parameter belongs to, given its dotted name; None for routers and norms."""
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    return {"embedding": "embedding", "lm_head": "head"}.get(name)


def join_words(words: tuple[str, ...]) -> str:
    """Returns words as an English list: "a, b or c"."""
    return f"{', '.join(words[:-1])} or {words[-1]}"
