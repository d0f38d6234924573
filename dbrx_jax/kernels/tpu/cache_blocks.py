"""Attention arithmetic of the TPU cache kernel: adds blocks of keys and values in VMEM to a running softmax.

A block is a matrix with one row for each position and head. A single query multiplies it as it is: its scores with
other heads' keys are masked, which costs less than to separate the heads. A chunk of queries separates them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dbrx_jax.kernels.tpu.packed_weights import LANES, iota

NEVER = 1 << 30  # more than any position
CHUNK_ROWS = 256  # a multiple of any tile of queries


class Softmax(NamedTuple):
    """An online softmax of queries: arrays in VMEM with one matrix for each set of query heads.

    Args:
      query: (sets, rows, K).
      out: sum of exp(score - largest) value, (sets, rows, K).
      largest, total: the largest score and the sum of exp(score - largest), in each lane of (sets, rows, LANES).
    """

    query: Any
    out: Any
    largest: Any
    total: Any

    def add(self, at: tuple, key: Array, value: Array, mask: Callable[[Array], Array], scales: list[Array]) -> None:
        """Adds keys and values (S, K) to the queries at an index of sets and rows.

        Args:
          mask: sets scores to -inf.
          scales: (1, S), if keys and values are int8.
        """
        q = self.query[at]
        scores = lax.dot_general(q, key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = mask(scores * scales[0] if scales else scores)
        old_largest = self.largest[at]
        largest = jnp.maximum(old_largest, scores.max(axis=1, keepdims=True))
        rescale = jnp.exp(old_largest - largest)
        probs = jnp.exp(scores - largest[:, :1])
        self.largest[at] = largest
        self.total[at] = self.total[at] * rescale + probs.sum(axis=1, keepdims=True)
        probs = (probs * scales[1] if scales else probs).astype(q.dtype)
        out = lax.dot_general(probs, value, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        self.out[at] = self.out[at] * rescale[:, :1] + out


class Blocks(NamedTuple):
    """Consecutive blocks of a row of the cache in VMEM, of P = LANES positions and G heads each.

    Args:
      arrays: keys and values (n, G P, K), and their scales (n, G, P) if they are int8.
      seen: the number of positions that a query sees, from the first on. The last block has some of them. What is
        behind them may be anything, NaN too.
      heads: G, a power of two.
      by_head: whether the rows of a block are ordered by head, then position, rather than by position, then head.
    """

    arrays: list[Any]
    seen: Array
    heads: int
    by_head: bool

    @property
    def scaled(self) -> bool:
        return len(self.arrays) == 4

    def seen_in(self, block: Array | int) -> Array:
        """Returns the number of positions that a query sees from the start of a block on."""
        return self.seen - block * LANES


def add_to_token(softmax: Softmax, blocks: Blocks, num: int) -> None:
    """Adds the first `num` blocks to the softmax of one query, which is one set of all its heads."""
    key_ref, value_ref, *scale_refs = blocks.arrays
    dtype, heads, last = softmax.query.dtype, blocks.heads, num - 1
    key = key_ref[:num].reshape(-1, key_ref.shape[2]).astype(dtype)
    values = [value_ref[b].astype(dtype) for b in range(num)]
    scales = [[ref[b].astype(jnp.float32) for b in range(num)] for ref in scale_refs]
    if scales:  # a probability of 0 times NaN would be NaN; integers are finite, their scales may not be
        is_seen = iota(scales[1][last].shape, 1) < blocks.seen_in(last)
        scales[1][last] = jnp.where(is_seen, scales[1][last], 0)
    else:
        row = iota(values[last].shape, 0)
        position = row & (LANES - 1) if blocks.by_head else row >> (heads.bit_length() - 1)
        values[last] = jnp.where(position < blocks.seen_in(last), values[last], jnp.zeros_like(values[last]))
    rows = [jnp.concatenate([_order_as_rows(x, blocks.by_head) for x in each], axis=1) for each in scales]
    softmax.add((0,), key, jnp.concatenate(values), lambda scores: _mask_token(scores, blocks, num), rows)


def _mask_token(scores: Array, blocks: Blocks, num: int) -> Array:
    """Masks the scores (H, num G P) of other heads' keys, and of positions that are not seen."""
    num_rows, heads = scores.shape[0], blocks.heads
    shape = (num_rows, LANES)
    row, lane = iota(shape, 0), iota(shape, 1)
    pieces = []
    for b in range(num):
        for piece in range(heads):  # the columns of a block in pieces of LANES
            first_row = (piece if blocks.by_head else lane & (heads - 1)) * (num_rows // heads)
            own_lane = jnp.where((first_row <= row) & (row < first_row + num_rows // heads), lane, NEVER)
            limit = blocks.seen_in(b) if blocks.by_head else blocks.seen_in(b) * heads - piece * LANES
            first = (b * heads + piece) * LANES
            pieces.append(jnp.where(own_lane < limit, scores[:, first : first + LANES], -jnp.inf))
    return jnp.concatenate(pieces, axis=1)


def _order_as_rows(scales: Array, by_head: bool) -> Array:
    """Returns scales (G, P) of a block as one row (1, G P), in the order of the block's rows."""
    heads = scales.shape[0]
    if by_head:
        return jnp.concatenate([scales[g : g + 1] for g in range(heads)], axis=1)
    pieces = []
    for piece in range(heads):
        row, column = iota(scales.shape, 0), iota(scales.shape, 1) + piece * LANES
        spread = jnp.take_along_axis(scales, column >> (heads.bit_length() - 1), axis=1)
        pieces.append(jnp.where(row == (column & (heads - 1)), spread, 0).sum(axis=0, keepdims=True))
    return jnp.concatenate(pieces, axis=1)


class ChunkScratch(NamedTuple):
    """VMEM for blocks whose heads are separated.

    Args:
      words: a block as 32-bit words, if its elements are smaller and not ordered by head.
      arrays: keys and values (G, n P, K), and their scales (G, 1, n P) in float32 if they are int8.
    """

    words: Any
    arrays: list[Any]


def add_to_chunk(softmax: Softmax, blocks: Blocks, num: int, scratch: ChunkScratch, mask: Callable) -> None:
    """Adds the first `num` blocks to the softmax of a tile of queries, which has a set for each key head.

    Blocks that no query sees add nothing. Heads are copied first and then looped over: unrolled, Mosaic takes ten
    seconds a layer to compile, and only a dimension outside of a matrix can have the loop's index. For the same reason
    only CHUNK_ROWS rows of a set are multiplied together; `mask` is for the first of them, and the same for the next.
    """

    def separate(b, _):
        seen, rows = blocks.seen_in(b), pl.ds(pl.multiple_of(b * LANES, LANES), LANES)
        for ref, copy in zip(blocks.arrays[:2], scratch.arrays[:2], strict=True):
            for g, x in enumerate(_separate_heads(ref.at[b], blocks, seen, scratch.words)):
                copy[g, rows] = x.astype(copy.dtype)
        for ref, copy in zip(blocks.arrays[2:], scratch.arrays[2:], strict=True):
            scales = jnp.where(iota(ref.shape[1:], 1) < seen, ref[b].astype(jnp.float32), 0)
            for g in range(blocks.heads):
                copy[g, :, rows] = scales[g : g + 1]

    lax.fori_loop(0, num, separate, None)
    size = num * LANES
    key_ref, value_ref, *scale_refs = scratch.arrays

    num_rows = chunk_rows(softmax.query)
    num_parts = softmax.query.shape[1] // num_rows

    def add_rows(i, _):
        g, part = lax.div(i, num_parts), lax.rem(i, num_parts)
        rows = pl.ds(pl.multiple_of(part * num_rows, num_rows), num_rows)
        scales = [ref[g, :, :size] for ref in scale_refs]
        softmax.add((g, rows), key_ref[g, :size], value_ref[g, :size], mask, scales)

    lax.fori_loop(0, blocks.heads * num_parts, add_rows, None)


def chunk_rows(query: Any) -> int:
    """Returns how many rows of queries (sets, rows, K) :func:`add_to_chunk` multiplies together."""
    return math.gcd(query.shape[1], CHUNK_ROWS)


def _separate_heads(block_ref: Any, blocks: Blocks, seen: Array, words_ref: Any) -> Iterator[Array]:
    """Yields each head of a block (G P, K) as (P, K), with zeros where no query sees it, unless it is int8.

    Strided loads are of 32-bit words, which hold the same element of two or four heads.
    """
    heads, packing = blocks.heads, 4 // block_ref.dtype.itemsize
    if words_ref is not None:
        words_ref[...] = pltpu.bitcast(block_ref[...], jnp.int32)
    for g in range(heads):
        if blocks.by_head:
            x = block_ref[g * LANES : (g + 1) * LANES]
        elif words_ref is None:
            x = block_ref[pl.ds(g, LANES, stride=heads), :]
        else:
            x = words_ref[pl.ds(g // packing, LANES, stride=heads // packing), :]
        if not blocks.scaled:
            x = jnp.where(iota(x.shape, 0) < seen, x, jnp.zeros_like(x))
        if words_ref is not None and packing == 2:  # two bfloat16, the upper halves of float32
            x = lax.bitcast_convert_type(x << 16 if g % 2 == 0 else x & -(1 << 16), jnp.float32)
        elif words_ref is not None:  # four int8
            x = ((x << (24 - 8 * (g % 4))) >> 24).astype(jnp.float32)
        yield x
