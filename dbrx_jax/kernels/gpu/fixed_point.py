"""Fixed-point activations for integer products with quantised weights on Hopper GPUs.

A row is stored as 15-bit integers times one scale, and each integer as two int8 digits, 128 a + b, which are two
columns of the product. The matrix unit multiplies digits by int8 or int4 weights exactly, so weights need not be
converted to floating point. An error of rounding is at most 2^-15 of the row's largest value.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

DIGITS = 2
MIN_ROWS = 4  # of an entry; their digits are the 8 columns of a wgmma
DIGIT_BASE = 128
LARGEST = 127 * DIGIT_BASE  # the largest number; its first digit is 127


class FixedPoint(NamedTuple):
    """Rows in fixed point: (DIGIT_BASE first digit + second digit) largest / LARGEST.

    Attributes:
      digits: int8 (..., 2 N, K), of each row the first digits, then the second.
      largest: the largest absolute value of each row, float32 (..., N).
    """

    digits: Int[Array, "*batch columns K"]
    largest: Float[Array, "*batch N"]


def to_fixed_point(rows: Float[Array, "*batch N K"]) -> FixedPoint:
    """Rounds rows to fixed point. The largest value of a row that is not finite is not finite."""
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    factor = LARGEST / jnp.where(largest == 0, 1, largest)
    numbers = jnp.round(rows * factor[..., None]).astype(jnp.int32)
    high = (numbers + DIGIT_BASE // 2) // DIGIT_BASE
    digits = jnp.stack([high, numbers - DIGIT_BASE * high], axis=-2).astype(jnp.int8)
    return FixedPoint(digits.reshape(*rows.shape[:-2], DIGITS * rows.shape[-2], rows.shape[-1]), largest)
