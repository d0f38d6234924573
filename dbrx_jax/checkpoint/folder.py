"""CheckpointFolder: the interface of the Orbax and Hugging Face readers."""

from pathlib import Path
from typing import Protocol

import numpy as np

from dbrx_jax.checkpoint.layouts import stored_shape
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.config import DbrxConfig
from dbrx_jax.quantization import Quantization

# In a folder that a conversion is at work in, or was killed in; gone when it is complete.
PLAN = "conversion.json"
# Rows are read so many bytes at a time.
BLOCK = 32 << 20


class CheckpointFolder(Protocol):
    """A complete checkpoint, by the model's parameters in their published two-dimensional shape."""

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
        """The quantisation of its weights, None unless they are quantised in the project's own formats."""
        ...

    def dtype(self) -> np.dtype:
        """The one dtype of all weights, after dequantising."""
        ...

    def parameter_dtype(self, parameter: str) -> np.dtype: ...

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows of a parameter, read into memory and dequantised."""
        ...

    def stored_rows(self, parameter: str, part: str, start: int, stop: int) -> np.ndarray:
        """Rows (along the first dimension) of the "values" or "scale" of a quantised parameter, as they are stored."""
        ...

    def pieces(self, parameter: str, start: int, stop: int) -> list[tuple[Path, int, int]] | None:
        """File, offset and length of the bytes of some rows, if they are stored in the needed form; else None."""
        ...


def shape_of(folder: CheckpointFolder, parameter: str) -> tuple[int, ...]:
    """A parameter's published shape."""
    return stored_shape(parameter_specs(folder.config)[parameter])


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows that make about BLOCK bytes."""
    return max(1, BLOCK // max(1, int(np.prod(shape[1:])) * itemsize))
