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

# Compiler options of programs that use this: XLA may reorder sums. NaN, infinities and quotients stay exact.
CPU_OPTIONS = {"xla_cpu_enable_fast_math": True}
# With more rows a dot is as fast. Below row_tiles.ROW_TILE, whose matmuls must give the same bits in every program.
MAX_ROWS = 7
# Sums that one loop computes together, by preference, for one row (True) and for several: the count must divide M.
SUMS_PER_LOOP = {True: (4, 2), False: (2, 1)}
# Parts of the contracted rows that one loop adds up, by preference: the count must divide them.
ROW_PARTS = (8, 7, 6, 5, 4)


def small_batch_matmul(
    x: Float[Array, "N C"], weight: Array | QuantizedArray, contracted: int
) -> Float[Array, "N M"] | None:
    """Computes x w^T for a weight (M, C), or x w for (C, M), in float32; returns None if it does not support them."""
    if x.shape[0] > MAX_ROWS or (isinstance(weight, QuantizedArray) and weight.kind == "fp8"):
        return None  # XLA converts float8 one by one
    # Ties the weight to x: in a loop over tokens XLA would dequantise it once before the loop and store the result.
    x, weight = lax.optimization_barrier((x, weight))
    if contracted == 1:
        return _contract_columns(x, weight)
    return _contract_rows(x, weight) if x.shape[0] == 1 else None


def _contract_columns(x: Array, weight: Array | QuantizedArray) -> Array | None:
    """Sums along each row of the weight, several at a time: XLA would turn one sum alone into a dot."""
    values, scale, groups = _values_and_scales(weight, 1)
    count = next((n for n in SUMS_PER_LOOP[x.shape[0] == 1] if values.shape[0] % n == 0), None)
    if count is None:
        return None
    size = values.shape[0] // count
    terms = []
    for row in x:
        factors = [f.reshape(1, -1) if groups is None else f.reshape(1, groups, -1) for f in _factors(row, weight)]
        for n in range(count):
            part = slice(n * size, (n + 1) * size)
            part_values = values[part] if groups is None else values[part].reshape(size, groups, -1)
            term = _multiply(factors, part_values)
            terms.append(term if groups is None or scale is None else term * scale[part, :, None])
    zeros, summed = (jnp.float32(0),) * len(terms), (1,) if groups is None else (1, 2)
    sums = lax.reduce(tuple(terms), zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), summed)
    y = jnp.concatenate(sums).reshape(x.shape[0], -1)
    return y if groups is not None or scale is None else y * scale.reshape(1, -1)


def _contract_rows(x: Array, weight: Array | QuantizedArray) -> Array | None:
    """Adds up parts of the weight's rows, each row times its element of x (1, C), then sums the rows that are left."""
    values, scale, groups = _values_and_scales(weight, 0)
    stored_rows, columns = values.shape
    count = next((n for n in ROW_PARTS if (stored_rows if groups is None else groups) % n == 0), None)
    if count is None:
        return None
    shape = (count, -1) if groups is None else (count, groups // count, stored_rows // groups)
    factors = [f.reshape(*shape, 1) for f in _factors(x[0], weight)]
    parts = values.reshape(*shape, columns)
    scales = None if groups is None or scale is None else scale.reshape(count, -1, 1, columns)
    terms = [_multiply([f[n] for f in factors], parts[n]) for n in range(count)]
    if scales is not None:
        terms = [term * scales[n] for n, term in enumerate(terms)]
    partial_sums = sum(terms[1:], start=terms[0]).reshape(-1, columns)
    y = jnp.ones((1, partial_sums.shape[0]), jnp.float32) @ partial_sums
    return y if groups is not None or scale is None else y * scale.reshape(1, -1)


def _values_and_scales(weight: Array | QuantizedArray, contracted: int) -> tuple[Array, Array | None, int | None]:
    """Returns the stored values, scales in float32, and the number of groups; None for what the weight has not."""
    if not isinstance(weight, QuantizedArray):
        return weight, None, None
    groups = None if weight.group is None else weight.scale.shape[contracted]
    return weight.values, weight.scale.astype(jnp.float32), groups


def _factors(row: Array, weight: Array | QuantizedArray) -> list[Array]:
    """Returns a row of x in float32; for int4 its even and its odd elements, as a byte has two values."""
    row = row.astype(jnp.float32)
    packed = isinstance(weight, QuantizedArray) and weight.kind == "int4"
    return [row[0::2], row[1::2]] if packed else [row]


def _multiply(factors: list[Array], values: Array) -> Array:
    """Multiplies stored values by :func:`_factors` in float32; adds the two products of a byte of int4."""
    if len(factors) == 1:
        return factors[0] * values.astype(jnp.float32)
    low, high = halves(values)
    return factors[0] * low.astype(jnp.float32) + factors[1] * high.astype(jnp.float32)
