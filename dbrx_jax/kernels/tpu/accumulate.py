"""Accumulates a tile of one expert's weights in VMEM into the sums of the TPU decode kernel.

Matmuls run on the stored integers, exact in the activations' dtype; scales multiply the float32 results. With group
scales, rows are repeated once for each group of a chunk with zeros outside the group, so that one matmul gives the
partial sums of all groups.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tpu.packed_weights import CHUNK, LANES, NIBBLE, WeightFormat, even_odd, iota, product

# Chunks of 256 of D in one turn of int4's loop.
UNROLL = 4


def accumulate_gate_up(x, weights, scales, sums, weight_format: WeightFormat) -> None:
    """Puts x w^T, (N, tile), into the sums, for the rows of w1 and v1 in VMEM."""
    for total in sums:
        total[...] = jnp.zeros_like(total)
    if weight_format.packed:
        unroll = math.gcd(x.shape[0], UNROLL)
        _loop(x.shape[0] // unroll, lambda i: _add_packed(x, weights, scales, sums, i * unroll, unroll, weight_format))
    else:
        size = _columns(x.shape[1])

        def add(i):
            part = _part(i, size)
            for w, total in zip(weights, sums, strict=True):
                total[...] += product(x[:, part], w[:, part].astype(x.dtype), 1)

        _loop(x.shape[1] // size, add)
    if weight_format.scaled:
        for s, total in zip(scales, sums, strict=True):
            factor = s[...].astype(jnp.float32) if weight_format.group is None else 1
            total[...] = total[...] * (factor / NIBBLE if weight_format.packed else factor)


def _add_packed(x, weights, scales, sums, first, count: int, weight_format: WeightFormat) -> None:
    """Adds `count` chunks of x w^T for int4 w1 and v1, in 16ths."""
    groups, rows = weight_format.groups(2 * LANES), x.shape[1]
    for chunk in range(count):
        own = _by_group(x[first + chunk], lax.rem(iota((rows, 2 * LANES), 1), LANES), LANES // groups, groups)
        part = pl.ds(pl.multiple_of((first + chunk) * LANES, LANES), LANES)
        for w, s, total in zip(weights, scales, sums, strict=True):
            parts = product(own, even_odd(w[:, part], x.dtype), 1)
            total[...] += _scaled_sum(parts, rows, s, (first + chunk) * groups, slice(None), weight_format)


def _by_group(x: Array, lane: Array, size: int, groups: int) -> Array:
    """Rows under each other once for each group of `size` lanes, and 0 in other groups: (groups * N, lanes)."""
    if groups == 1:
        return x
    group = lax.div(lane, size)
    return jnp.concatenate([jnp.where(group == g, x, jnp.zeros_like(x)) for g in range(groups)])


def _scaled_sum(parts: Array, rows: int, s, first, columns, weight_format: WeightFormat) -> Array:
    """The sum over groups of (groups * N, M) times their scales, which are rows of s from `first` on."""
    if weight_format.group is None:
        return parts
    pieces = [parts[g : g + rows] for g in range(0, parts.shape[0], rows)]
    return sum(piece * s[pl.ds(first + g, 1), columns] for g, piece in enumerate(pieces))


def accumulate_down(y, inner: Array, w2, s2, t, weight_format: WeightFormat) -> None:
    """Adds inner w2 to y, a few columns at a time; in groups, chunks of F that fill the matrix unit."""
    rows, tile = inner.shape
    depth = tile if weight_format.group is None else math.gcd(tile, 2 * LANES)
    groups, size = weight_format.groups(depth), _columns(y.shape[1])
    owns = [inner[:, f : f + depth] for f in range(0, tile, depth)]
    owns = [_by_group(own, iota((rows, depth), 1), depth // groups, groups) for own in owns]

    def add(i):
        columns = _part(i, size)
        for chunk, own in enumerate(owns):
            stored = depth // 2 if weight_format.packed else depth
            w = w2[chunk * stored : (chunk + 1) * stored, columns]
            w = (pltpu.bitcast(w, jnp.int4) if weight_format.packed else w).astype(inner.dtype)
            first = (t * (tile // depth) + chunk) * groups
            out = _scaled_sum(product(own, w, 0), rows, s2, first, columns, weight_format)
            if weight_format.scaled and weight_format.group is None:
                out = out * s2[:, columns].astype(jnp.float32)
            y[:, columns] += out

    _loop(y.shape[1] // size, add)


def _loop(count: int, body) -> None:
    """A loop in the kernel: written out, these steps take the compiler half a minute a layer."""
    if count == 1:
        body(0)
    else:
        lax.fori_loop(0, count, lambda i, carry: body(i), None)


def _columns(d: int) -> int:
    """Number of columns of D that are computed at a time."""
    return next(n for n in range(min(CHUNK, d), 0, -LANES) if d % n == 0)


def _part(i, size: int):
    return pl.ds(pl.multiple_of(i * size, size), size)
