"""Small-batch matmul on a CPU: sums that XLA fuses into one loop, which reads the weight once in its memory layout.

XLA's own dot casts a bfloat16 weight to float32 in memory first, or copies it to another layout, and knows no int4 or
int8 weights; benchmarks/products.py times both. Sums along a weight's rows are vectorised only in programs that may
reorder sums (CPU_OPTIONS).
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from dbrx_jax.quantization import QuantizedArray
from dbrx_jax.quantization.array import halves

# For the programs in which this is used: XLA may add in another order. NaN, infinities and quotients stay exact.
CPU_OPTIONS = {"xla_cpu_enable_fast_math": True}
# More are as fast as a product. Below ops.tiles.TILE, whose products must be the same in all programs.
MAX_ROWS = 7
# Outputs whose sums run side by side in one loop, for one row and for several.
SIDE_BY_SIDE = {True: (4, 2), False: (2, 1)}
# Parts of a contraction whose products are added up in one loop.
PARTS = (8, 7, 6, 5, 4)


def small_batch_matmul(
    x: Float[Array, "N C"], weight: Array | QuantizedArray, contracted: int
) -> Float[Array, "N M"] | None:
    """x w^T for a weight (M, C), or x w for (C, M), in float32; None where this is no way to do it."""
    if x.shape[0] > MAX_ROWS or (isinstance(weight, QuantizedArray) and weight.kind == "fp8"):
        return None  # XLA converts float8 one by one
    # In a loop over tokens XLA would dequantise the weights once ahead of it, and keep the result.
    x, weight = lax.optimization_barrier((x, weight))
    if contracted == 1:
        return _over_columns(x, weight)
    return _over_rows(x, weight) if x.shape[0] == 1 else None


def _over_columns(x: Array, weight: Array | QuantizedArray) -> Array | None:
    """Sums along each row of the weight, several at a time: one sum alone would become XLA's own product."""
    values, scale, groups = _parts_of(weight, 1)
    count = next((n for n in SIDE_BY_SIDE[x.shape[0] == 1] if values.shape[0] % n == 0), None)
    if count is None:
        return None
    size = values.shape[0] // count
    terms = []
    for row in x:
        factors = [f.reshape(1, -1) if groups is None else f.reshape(1, groups, -1) for f in _factors(row, weight)]
        for n in range(count):
            part = slice(n * size, (n + 1) * size)
            stored_values = values[part] if groups is None else values[part].reshape(size, groups, -1)
            term = _term(factors, stored_values)
            terms.append(term if groups is None or scale is None else term * scale[part, :, None])
    zeros, summed = (jnp.float32(0),) * len(terms), (1,) if groups is None else (1, 2)
    sums = lax.reduce(tuple(terms), zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), summed)
    y = jnp.concatenate(sums).reshape(x.shape[0], -1)
    return y if groups is not None or scale is None else y * scale.reshape(1, -1)


def _over_rows(x: Array, weight: Array | QuantizedArray) -> Array | None:
    """Parts of the weight's rows, times the elements of a row (1, C), added up; and the sum of what is left."""
    values, scale, groups = _parts_of(weight, 0)
    stored, columns = values.shape
    count = next((n for n in PARTS if (stored if groups is None else groups) % n == 0), None)
    if count is None:
        return None
    shape = (count, -1) if groups is None else (count, groups // count, stored // groups)
    factors = [f.reshape(*shape, 1) for f in _factors(x[0], weight)]
    stored_values = values.reshape(*shape, columns)
    scales = None if groups is None or scale is None else scale.reshape(count, -1, 1, columns)
    terms = [_term([f[n] for f in factors], stored_values[n]) for n in range(count)]
    if scales is not None:
        terms = [term * scales[n] for n, term in enumerate(terms)]
    total = sum(terms[1:], start=terms[0]).reshape(-1, columns)
    y = jnp.ones((1, total.shape[0]), jnp.float32) @ total
    return y if groups is not None or scale is None else y * scale.reshape(1, -1)


def _parts_of(weight: Array | QuantizedArray, contracted: int) -> tuple[Array, Array | None, int | None]:
    """Values as they are stored, scales in float32, and how many groups the contraction has, if any."""
    if not isinstance(weight, QuantizedArray):
        return weight, None, None
    groups = None if weight.group is None else weight.scale.shape[contracted]
    return weight.values, weight.scale.astype(jnp.float32), groups


def _factors(row: Array, weight: Array | QuantizedArray) -> list[Array]:
    """A row in float32; of two values in a byte the even elements and the odd ones."""
    row = row.astype(jnp.float32)
    packed = isinstance(weight, QuantizedArray) and weight.kind == "int4"
    return [row[0::2], row[1::2]] if packed else [row]


def _term(factors: list[Array], stored_values: Array) -> Array:
    """Stored values times the row's elements, in float32."""
    if len(factors) == 1:
        return factors[0] * stored_values.astype(jnp.float32)
    low, high = halves(stored_values)
    return factors[0] * low.astype(jnp.float32) + factors[1] * high.astype(jnp.float32)
