"""Experts with int8 or int4 weights for small batches on Hopper GPUs: integer products of fixed-point activations.

Up to ALL_ROWS rows go through each active expert together. Of more rows each expert gets its own, in items of equal
size (integer_products.py): with 64 rows and 4 of 16 experts a row, an expert has 16 on average.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from dbrx_jax.kernels.gpu.fixed_point import DIGITS, MIN_ROWS, FixedPoint, to_fixed_point
from dbrx_jax.kernels.gpu.fixed_point_rows import fixed_point_rows
from dbrx_jax.kernels.gpu.integer_products import IntegerTiles, multiply
from dbrx_jax.kernels.gpu.integer_weights import CHANNELS, IntegerWeights, fits, pack, split_activations
from dbrx_jax.kernels.tile_table import name_of, table
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight

ALL_ROWS = 8
# With fewer thread blocks for gate and up, each has blocks of its own, which are more and shorter.
FUSED_BLOCKS = 8 * 132
_MIN_BLOCKS = 380  # thread blocks at least: nearly three for each of a card's 132 multiprocessors
_SHARED_BYTES = 56 * 1024  # shared memory of a thread block's steps, so that three or four fit a multiprocessor


class Items(NamedTuple):
    """Experts and their rows, in entries of equal size; entries from `number` on are empty.

    Attributes:
      expert: (I,), indices of the list of active experts.
      rows: row numbers (I, T), N where an entry has fewer rows.
      entry, slot: for each active expert and row, (C, N), the entry and the place in it.
    """

    expert: Int[Array, "I"]
    rows: Int[Array, "I T"]
    number: Int[Array, ""]
    entry: Int[Array, "C N"]
    slot: Int[Array, "C N"]


def group_rows(is_used: Bool[Array, "C N"], size: int) -> Items:
    """Lists each active expert's rows in entries of `size` rows.

    Args:
      is_used: the rows of each active expert.
    """
    C, N = is_used.shape
    counts = jnp.sum(is_used, axis=1)
    entries = -(-counts // size)
    ends = jnp.cumsum(entries)
    numbers = jnp.arange(C * -(-N // size))
    expert = jnp.minimum(jnp.sum(numbers[:, None] >= ends, axis=1), C - 1)
    first = ends - entries
    rank = jnp.cumsum(is_used, axis=1) - 1
    entry, slot = first[:, None] + rank // size, rank % size
    here = is_used[expert] & (entry[expert] == numbers[:, None])  # (I, N)
    places = here[:, None] & (slot[expert][:, None] == jnp.arange(size)[:, None])  # (I, T, N)
    rows = jnp.min(jnp.where(places, jnp.arange(N), N), axis=2)
    return Items(expert, rows, ends[-1], entry, slot)


def item_rows(num_rows: int) -> int:
    """Returns the rows of an entry."""
    return num_rows + -num_rows % MIN_ROWS if num_rows <= ALL_ROWS else max(8, num_rows // 2 + -(num_rows // 2) % 4)


def supports(w1: Weight, v1: Weight, w2: Weight) -> bool:
    """Returns whether :func:`integer_experts` supports these weights (arrays or shapes)."""
    if not all(fits(w, contracted) for w, contracted in ((w1, 1), (v1, 1), (w2, 0))):
        return False
    gate, up = packed_shapes(w1, v1, w2)[:2]
    return (gate.int4, gate.group, gate.bits.shape) == (up.int4, up.group, up.bits.shape)


def packed_shapes(*weights: Weight) -> list[IntegerWeights]:
    """Returns gate, up and down as :func:`pack` views them, as shapes."""
    return [jax.eval_shape(partial(pack, contracted=c), w) for w, c in zip(weights, (1, 1, 0), strict=True)]


def integer_experts(
    x: Float[Array, "N D"],
    active: Int[Array, "C"],
    num_active: Int[Array, ""],
    is_used: Bool[Array, "C N"],
    combine_weights: Float[Array, "C N"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    tiles: tuple[IntegerTiles, IntegerTiles] | None = None,
    fixed: FixedPoint | None = None,
    interpret: Any = None,
) -> Float[Array, "N D"]:
    """Computes the float32 sum over c of combine_weights[c] times expert active[c]'s outputs where `is_used`.

    Args:
      fixed: up to ALL_ROWS rows x in fixed point for w1, if they have been rounded.
    """
    C, N = is_used.shape
    gate, up, down = (pack(w, c) for w, c in ((w1, 1), (v1, 1), (w2, 0)))
    size = item_rows(N)
    if tiles is None:
        tiles = default_tiles((gate, up), size, C), default_tiles((down,), size, C)
    if N <= ALL_ROWS:
        num_items, experts, entry, slot = num_active, active, jnp.arange(C)[:, None], jnp.arange(N)
        rows = fixed or fixed_point_rows(lambda row: row, [x[None, None]], size, None, gate, interpret)
    else:
        items = group_rows(is_used, size)
        num_items, experts, entry, slot = items.number, active[items.expert], items.entry, items.slot
        rows = _gather(to_fixed_point(x), items.rows, gate)
    run = partial(multiply, experts=experts, num_items=num_items, interpret=interpret)
    if C * gate.channels // CHANNELS < FUSED_BLOCKS:
        inner = run(rows, [(gate,), (up,)], tiles=tiles[0], name="experts_gate_and_up")
    else:
        inner = run(rows, [(gate, up)], tiles=tiles[0], activation=ACTIVATIONS[activation], name="experts_inner")

    def activate(inner: Array, *up: Array) -> Array:  # the kernel has activated them if it computed them together
        return ACTIVATIONS[activation](inner) * up[0] if up else inner

    inner_rows = fixed_point_rows(activate, inner, size, num_items, down, interpret)
    (y,) = run(inner_rows, [(down,)], tiles=tiles[1], name="experts_down")
    y = jnp.sum(y[jnp.where(is_used, entry, 0), :, jnp.where(is_used, slot, 0)], axis=2)  # (C, N, D)
    # Selected, not multiplied by 0: other entries may be uninitialised, infinite or NaN.
    return jnp.sum(jnp.where(is_used[..., None], y * combine_weights[..., None], 0), axis=0)


def _gather(x: FixedPoint, rows: Int[Array, "I T"], weight: IntegerWeights) -> FixedPoint:
    """Returns the rows of each entry, split as a weight's bytes are; row N is zeros."""
    columns = (DIGITS * rows[..., None] + jnp.arange(DIGITS)).reshape(rows.shape[0], -1)
    digits = x.digits.at[columns].get(mode="fill", fill_value=0)
    return FixedPoint(split_activations(digits, weight), x.largest.at[rows].get(mode="fill", fill_value=0))


def default_tiles(weights: tuple[IntegerWeights, ...], rows: int, experts: int) -> IntegerTiles:
    """Returns the table's tile sizes if they are valid, else the first candidate; for weights of one shape."""
    candidates = candidate_tiles(weights, rows, experts)
    tuned = table().get(tiles_name(weights, rows, experts))
    return next((t for t in candidates if list(t) == tuned), candidates[0])


def tiles_name(weights: tuple[IntegerWeights, ...], rows: int, experts: int) -> str:
    """Returns the key of these products in the table of tile sizes."""
    w, kind = weights[0], "int4" if weights[0].int4 else "int8"
    sizes = (w.num_outputs * w.channels, w.num_inputs * w.depth)
    return name_of(f"experts_gpu {len(weights)} of {experts} by {rows}", kind, w.group, sizes, rows)


def candidate_tiles(weights: tuple[IntegerWeights, ...], rows: int, experts: int) -> list[IntegerTiles]:
    """Returns tile sizes worth timing, the default first. Gate and up are not split."""
    return list(_candidates(weights, rows, experts))


def _candidates(weights: tuple[IntegerWeights, ...], rows: int, experts: int) -> Iterator[IntegerTiles]:
    weight = weights[0]
    parts = weight.num_inputs * weight.groups_per_block
    for depth in _depths(weight, rows):
        if weight.depth % depth:
            continue
        step_bytes = depth * (len(weights) * CHANNELS * weight.num_outputs + parts * DIGITS * rows)
        most = min(max(2, _SHARED_BYTES // step_bytes), 8)
        blocks, num_steps = experts * (weight.channels // CHANNELS), weight.depth // depth
        splits = [s for s in range(1, num_steps + 1) if num_steps % s == 0 and (s == 1 or num_steps // s >= 3)]
        enough = [s for s in splits if blocks * s >= _MIN_BLOCKS] or splits[-1:]
        for split, steps in itertools.product([1] if len(weights) == 2 else enough[:2], (most, most // 2)):
            if steps >= 2:
                yield IntegerTiles(depth, steps, split)


def _depths(weight: IntegerWeights, rows: int) -> tuple[int, ...]:
    """Returns depths worth timing; those of many rows leave registers for accumulators."""
    if weight.contracted == 1:
        return (256, 128, 64) if DIGITS * rows <= 16 else (128, 64)
    return (128, 64) if weight.int4 else (128, 256, 64)
