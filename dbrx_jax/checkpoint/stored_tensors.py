"""Tensors in safetensors files: plain, or quantised and dequantised when read (MLX, FP8)."""

import dataclasses
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from dbrx_jax.checkpoint.raw_arrays import read_bytes

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class PlainTensor:
    """A tensor stored as consecutive bytes of a file."""

    file: Path
    offset: int  # bytes from the beginning of the file
    dtype: np.dtype
    shape: tuple[int, ...]

    quantization = None

    @property
    def files(self) -> list[Path]:
        return [self.file]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def problem(self) -> str | None:
        """Returns why the tensor cannot be used as a weight; None if it can."""
        return None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows into memory.

        Raises:
          CheckpointError: the file has become shorter, or cannot be read any more.
        """
        data = read_bytes([(self.file, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)])
        return data.view(self.dtype).reshape(stop - start, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class MlxTensor:
    """MLX's affine quantisation: w = scale * q + bias, for groups of consecutive elements of a row.

    q has `bits` bits; a uint32 packs 32 / bits of them, the first in the lowest bits.
    """

    packed: PlainTensor
    scales: PlainTensor
    biases: PlainTensor
    bits: int
    group: int

    @property
    def quantization(self) -> str:
        return mlx_description(self.bits, self.group)

    @property
    def files(self) -> list[Path]:
        return [self.packed.file, self.scales.file, self.biases.file]

    @property
    def dtype(self) -> np.dtype:
        return self.scales.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.packed.shape
        return (*rows, columns * (32 // self.bits))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.biases.nbytes

    def problem(self) -> str | None:
        if len(self.packed.shape) != 2:
            return f"is packed, and has shape {self.packed.shape} rather than rows and columns"
        if self.shape[1] % self.group:
            return f"its rows of {self.shape[-1]} elements are not whole groups of {self.group}"
        expected = (self.shape[0], self.shape[1] // self.group)
        for name, tensor in (("scales", self.scales), ("biases", self.biases)):
            if tensor.shape != expected or tensor.dtype != self.scales.dtype:
                return f"its {name} must be {self.scales.dtype} {expected}, got {tensor.dtype} {tensor.shape}"
        return None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads and dequantises rows in float32, rounded once to the scales' dtype."""
        packed = self.packed.rows(start, stop)
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        q = (packed[:, :, None] >> shifts) & np.uint32((1 << self.bits) - 1)
        q = q.reshape(len(packed), -1, self.group).astype(np.float32)
        scales, biases = (t.rows(start, stop).astype(np.float32)[:, :, None] for t in (self.scales, self.biases))
        return (q * scales + biases).reshape(len(packed), -1).astype(self.dtype)


def mlx_description(bits: int, group: int) -> str:
    """Returns the name of MLX's affine quantisation with these bits and group size, for people."""
    return f"MLX {bits}-bit in groups of {group}"


@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    """FP8 values times a scale: one for the tensor, or one for each expert (equal numbers of rows).

    Dequantised to bfloat16, which represents every FP8 value; the product is rounded once.
    """

    values: PlainTensor
    scale: PlainTensor
    num_experts: int  # in the tensor

    quantization = "FP8"

    @property
    def files(self) -> list[Path]:
        return [self.values.file, self.scale.file]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def problem(self) -> str | None:
        if not self.shape:
            return "is FP8, and one number rather than rows"
        num_scales = math.prod(self.scale.shape)
        if num_scales not in (1, self.num_experts) or self.shape[0] % num_scales or self.scale.dtype.name not in FLOATS:
            return f"its scale must be one float, or one for each expert, got {self.scale.dtype} {self.scale.shape}"
        return None

    def rows(self, start: int, stop: int) -> np.ndarray:
        scales = self.scale.rows(0, self.scale.shape[0]) if self.scale.shape else self.scale.rows(0, 1)
        scales = scales.astype(np.float32).reshape(-1)
        rows_per_scale = self.shape[0] // len(scales)
        row_scales = scales[np.arange(start, stop) // rows_per_scale]
        values = self.values.rows(start, stop).astype(np.float32)
        return (values * row_scales.reshape(-1, *[1] * (values.ndim - 1))).astype(self.dtype)


StoredTensor = PlainTensor | MlxTensor | Fp8Tensor
