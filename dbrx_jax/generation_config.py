"""GenerationConfig: a checkpoint's end-of-sequence and padding tokens."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from dbrx_jax.errors import ConfigError
from dbrx_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Token ids that end a row, and the id that pads ended rows."""

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a ``generation_config.json``.

        Raises:
          ConfigError: the file is missing, no JSON object, or has ids that are not whole numbers.
        """
        data = read_json(path)
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: expected a JSON object")
        eos = data.get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = data.get("pad_token_id")
        for value in [*ids, *([] if pad is None else [pad])]:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{path}: expected token ids as whole numbers, got {value!r}")
        return cls(tuple(ids), pad)
