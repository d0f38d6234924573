"""CheckpointFolder: the interface of the Orbax and Hugging Face readers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.config import DbrxConfig
from dbrx_jax.quantization import Quantization

# Marks a folder whose conversion is running or was killed; deleted when the conversion is complete.
PLAN = "conversion.json"
RECORDS = "records"  # folder of the records of arrays that are complete, in a folder with PLAN
# Bytes of rows that are read at a time.
BLOCK = 32 << 20


class CheckpointFolder(Protocol):
    """A complete checkpoint, read by parameter name in the published two-dimensional shapes.

    Methods that read raise CheckpointError if a file is missing, damaged or shorter than it was when opened.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> DbrxConfig: ...

    @property
    def description(self) -> str:
        """The kind of checkpoint, for people."""
        ...

    @property
    def size(self) -> int:
        """Bytes of all weights as they are stored."""
        ...

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        ...

    @property
    def quantization(self) -> Quantization | None:
        """The quantisation of its weights; None unless they are in one of the project's own formats."""
        ...

    def dtype(self) -> np.dtype:
        """Returns the dtype to load the weights in: their own after dequantising; warns if they have several."""
        ...

    def parameter_dtype(self, parameter: str) -> np.dtype:
        """Returns the dtype of one parameter after dequantising."""
        ...

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Reads rows of a parameter into memory, dequantised."""
        ...

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        """Reads rows (first dimension) of the "values" or "scale" of a quantised parameter, as they are stored."""
        ...

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        """Returns file, offset and length of the bytes of rows; None if they must be decoded or transposed first."""
        ...


def shape_of(folder: CheckpointFolder, parameter: str) -> tuple[int, ...]:
    """Returns a parameter's published shape."""
    return stored_shape(parameter_specs(folder.config)[parameter])


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the number of rows that make about BLOCK bytes."""
    return max(1, BLOCK // max(1, int(np.prod(shape[1:])) * itemsize))


def and_more(names: Sequence[str]) -> str:
    """Returns, for a message that quotes the first of some names, how many more there are."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
