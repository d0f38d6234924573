"""Accumulates matmuls with a tile of one expert's weights in VMEM, for the TPU decode kernel.

Matmuls run on the stored values, exact in the activations' dtype; scales multiply the float32 results. With groups,
rows are repeated for each group of a chunk, with zeros elsewhere, so that one matmul gives all groups' partial sums.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tpu.packed_weights import (
    INT4_FACTOR,
    LANES,
    WeightFormat,
    chunk_size,
    chunk_slice,
    iota,
    loop,
    matmul,
    unpack_even_odd,
)

UNROLL = 4  # int4 chunks (256 elements of D) per loop iteration


def accumulate_gate_up(x, weights, scales, sums, weight_format: WeightFormat) -> None:
    """Stores x w1^T and x v1^T (N, tile) in `sums`, scaled, for tiles of w1 and v1 (`weights`)."""
    for total in sums:
        total[...] = jnp.zeros_like(total)
    if weight_format.packed:
        unroll = math.gcd(x.shape[0], UNROLL)
        loop(x.shape[0] // unroll, lambda i: _add_packed(x, weights, scales, sums, i * unroll, unroll, weight_format))
    else:
        size = chunk_size(x.shape[1])

        def add_chunk(i):
            chunk = chunk_slice(i, size)
            for w, total in zip(weights, sums, strict=True):
                total[...] += matmul(x[:, chunk], w[:, chunk].astype(x.dtype), 1)

        loop(x.shape[1] // size, add_chunk)
    if weight_format.scaled:
        for s, total in zip(scales, sums, strict=True):
            factor = s[...].astype(jnp.float32) if weight_format.group is None else 1
            total[...] = total[...] * (factor / INT4_FACTOR if weight_format.packed else factor)


def _add_packed(x, weights, scales, sums, first, count: int, weight_format: WeightFormat) -> None:
    """Adds x w^T over `count` chunks of 256 elements from chunk `first` on, for int4 w1 and v1, times INT4_FACTOR."""
    num_rows, num_groups = x.shape[1], weight_format.num_groups(2 * LANES)
    for i in range(count):
        x_chunk = x[first + i]
        byte = lax.rem(iota(x_chunk.shape, 1), LANES)  # even elements in the first 128 lanes, odd ones in the others
        grouped = _repeat_by_group(x_chunk, byte, LANES // num_groups, num_groups)
        chunk = chunk_slice(first + i, LANES)
        for w, s, total in zip(weights, scales, sums, strict=True):
            partial_sums = matmul(grouped, unpack_even_odd(w[:, chunk], x.dtype), 1)
            total[...] += _scaled_sum(partial_sums, num_rows, s, (first + i) * num_groups, slice(None), weight_format)


def _repeat_by_group(x: Array, position: Array, group_size: int, num_groups: int) -> Array:
    """Repeats rows for each group of positions, with zeros outside the group: (N, M) to (num_groups * N, M)."""
    if num_groups == 1:
        return x
    group = lax.div(position, group_size)
    return jnp.concatenate([jnp.where(group == g, x, jnp.zeros_like(x)) for g in range(num_groups)])


def _scaled_sum(partial_sums: Array, num_rows: int, s, first, columns, weight_format: WeightFormat) -> Array:
    """Sums the groups' partial sums (num_groups * N, M) times their scales, rows of s from `first` on."""
    if weight_format.group is None:
        return partial_sums
    by_group = [partial_sums[start : start + num_rows] for start in range(0, partial_sums.shape[0], num_rows)]
    return sum(p * s[pl.ds(first + g, 1), columns] for g, p in enumerate(by_group))


def accumulate_down(y, inner: Array, w2, s2, tile_index, weight_format: WeightFormat) -> None:
    """Adds inner w2 to y (N, D), a chunk of columns at a time; with groups, 256 elements of F per matmul."""
    num_rows, tile = inner.shape
    depth = tile if weight_format.group is None else math.gcd(tile, 2 * LANES)
    stored_depth = depth // 2 if weight_format.packed else depth
    num_groups, size = weight_format.num_groups(depth), chunk_size(y.shape[1])
    chunks = [inner[:, start : start + depth] for start in range(0, tile, depth)]
    chunks = [_repeat_by_group(x, iota(x.shape, 1), depth // num_groups, num_groups) for x in chunks]

    def add_columns(i):
        columns = chunk_slice(i, size)
        for c, chunk in enumerate(chunks):
            w = w2[c * stored_depth : (c + 1) * stored_depth, columns]
            w = (pltpu.bitcast(w, jnp.int4) if weight_format.packed else w).astype(inner.dtype)
            first_group = (tile_index * len(chunks) + c) * num_groups
            out = _scaled_sum(matmul(chunk, w, 0), num_rows, s2, first_group, columns, weight_format)
            if weight_format.scaled and weight_format.group is None:
                out = out * s2[:, columns].astype(jnp.float32)
            y[:, columns] += out

    loop(y.shape[1] // size, add_columns)
