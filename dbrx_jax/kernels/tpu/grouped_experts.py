"""Experts of large batches on TPUs: one kernel for the gated MLP of rows sorted by expert.

The grid goes over blocks of rows of one expert and tiles of F. A block's rows and sums (rows, D) stay in VMEM. A step
dequantises its tile of the three weights once and adds (act(x w1^T) * (x v1^T)) w2 to the sums, a tile of rows at a
time. So rows are read once, the inner activations never leave VMEM, and weights are read once for each block.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from dbrx_jax.kernels.tpu.packed_weights import (
    CHUNK,
    INT4_FACTOR,
    LANES,
    MAX_VMEM,
    WeightFormat,
    chunk_size,
    chunk_slice,
    expand_column_scales,
    expand_row_scales,
    has_kernel,
    in_hbm,
    loop,
    matmul,
    scale_bytes,
    stored_values,
    unpack_even_odd,
)
from dbrx_jax.ops.experts import ACTIVATIONS
from dbrx_jax.ops.linear import Weight
from dbrx_jax.quantization import QuantizedArray

ROW_TILE = 128  # rows of one matmul; each expert's rows begin at a multiple
BLOCK_TILES = (6, 4, 2, 1)  # row tiles of a block: an expert of 16 with top-4 has 512 rows of 2048 tokens on average
MAX_WIDTH = 256  # one pass of the matrix unit of a v6e; of F
MAX_GATHERED = 31 << 20


class BlockSizes(NamedTuple):
    """Sizes of a step: most row tiles of a block, and rows of w1, v1 and w2, a divisor of F."""

    tiles: int
    width: int


class Blocks(NamedTuple):
    """Schedule of up to B blocks, each with consecutive row tiles of one expert.

    Args:
      expert: the expert of each block.
      first: first row tile.
      num_tiles: number of row tiles.
      number: number of blocks; at least 1, which may have no tile.
    """

    expert: Int[Array, "B"]
    first: Int[Array, "B"]
    num_tiles: Int[Array, "B"]
    number: Int[Array, ""]


def supports(x: Float[Array, "N D"], w1: Weight, v1: Weight, w2: Weight, interpret: bool = False) -> bool:
    """Returns whether :func:`grouped_experts` supports these arrays (or shapes).

    All three weights (E, F, D) must have the same storage format, one that the kernel can dequantise.
    """
    weight_format, (_, width, d) = WeightFormat.of(w1), w1.shape
    if any(not has_kernel(w) or WeightFormat.of(w) != weight_format or w.shape != w1.shape for w in (w1, v1, w2)):
        return False
    if (
        x.dtype not in (jnp.bfloat16, jnp.float32)
        or width % LANES
        or d % (2 * LANES if weight_format.packed else LANES)
    ):
        return False
    if not weight_format.scaled and w1.dtype != x.dtype:
        return False
    if weight_format.group is not None and (not weight_format.packed or LANES % weight_format.group):
        return False
    return block_sizes(x, w1) is not None


def block_sizes(x: Float[Array, "N D"], w1: Weight) -> BlockSizes | None:
    """Returns the sizes with the most rows that fit into VMEM, and of those the widest; None if none fits."""
    widths = [n for n in (MAX_WIDTH, LANES) if w1.shape[1] % n == 0]
    sizes = (BlockSizes(tiles, width) for tiles in BLOCK_TILES for width in widths)
    return next((s for s in sizes if vmem_bytes(x, w1, s) <= MAX_VMEM), None)


def num_row_tiles(num_rows: int, num_experts: int) -> int:
    """Returns the most row tiles that `num_rows` rows of `num_experts` experts can need."""
    return (num_rows + num_experts * (ROW_TILE - 1)) // ROW_TILE


def row_blocks(sizes: Int[Array, "E"], num_tiles: int, block_tiles: int) -> Blocks:
    """Divides each expert's row tiles into as few blocks as possible, of about equal size."""
    num_experts = sizes.shape[0]
    tiles = (sizes + ROW_TILE - 1) // ROW_TILE
    blocks = (tiles + block_tiles - 1) // block_tiles
    last_blocks = jnp.cumsum(blocks)
    block = jnp.arange(num_tiles // block_tiles + num_experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(block[:, None] >= last_blocks, axis=1, dtype=jnp.int32), num_experts - 1)
    per_block = (tiles // jnp.maximum(blocks, 1))[expert]
    larger = (tiles - tiles // jnp.maximum(blocks, 1) * blocks)[expert]  # this many blocks have one tile more
    index = block - (last_blocks - blocks)[expert]
    first = (jnp.cumsum(tiles) - tiles)[expert] + index * per_block + jnp.minimum(index, larger)
    count = jnp.where(block < last_blocks[-1], per_block + (index < larger), 0)
    number = jnp.maximum(last_blocks[-1], 1)
    return Blocks(expert, *(a.astype(jnp.int32) for a in (first, count, number)))


def grouped_experts(
    rows: Sequence[Float[Array, "P D/parts"]],
    sizes: Int[Array, "E"],
    w1: Weight,
    v1: Weight,
    w2: Weight,
    activation: str,
    interpret: bool = False,
) -> list[Float[Array, "P D/parts"]]:
    """Applies each expert to its rows, summed in float32, in the rows' dtype; other rows are undefined.

    Args:
      rows: parts of the columns of (P, D), as are the results; sorted by expert, each of whose first row is the next
        multiple of ROW_TILE. For int4, as :func:`permuted_columns` arranges them.
      sizes: number of rows of each expert.
      w1, v1, w2: (E, F, D), arrays of the rows' dtype or quantised, as :func:`supports` accepts them.
      activation: a name of ACTIVATIONS.
      interpret: interprets the kernel on a CPU.
    """
    num_tiles, block = rows[0].shape[0] // ROW_TILE, block_sizes(rows[0], w1)
    assert block is not None
    blocks = row_blocks(sizes.astype(jnp.int32), num_tiles, block.tiles)
    weights, scales = grouped_operands(w1, v1, w2, block)
    weights = weights if interpret else [in_hbm(w) for w in weights]
    # Results may go over a block's rows, which halves the room that they take together. But XLA keeps arrays that are
    # aliased in HBM where it had room for both in VMEM, so only those that are in parts are.
    (results,) = pl.pallas_call(
        partial(_kernel, activation=activation, weight_format=WeightFormat.of(w1)),
        out_shape=[[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in rows]],
        grid_spec=grouped_grid(rows, weights, scales, blocks, block, WeightFormat.of(w1)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MAX_VMEM),
        input_output_aliases={len(blocks) - 1 + i: i for i in range(len(rows))} if len(rows) > 1 else {},
        interpret=interpret,
        name="grouped_experts",
    )(*blocks[:-1], list(rows), weights, scales)
    return results


def permuted_columns(x: Float[Array, "N D"], w1: Weight) -> Float[Array, "N D"]:
    """Arranges x for int4 weights: in each chunk of 256 columns even ones first, as unpack_even_odd unpacks bytes."""
    if not WeightFormat.of(w1).packed:
        return x
    return x.reshape(x.shape[0], -1, LANES, 2).swapaxes(2, 3).reshape(x.shape)


def num_column_parts(num_rows: int, x: Float[Array, "N D"]) -> int:
    """Returns into how many parts the columns of `num_rows` rows like those of x are best divided.

    XLA gathers from arrays of 32 MiB or more on the SparseCores of a v5p or v6e: through HBM, while smaller ones stay
    in VMEM. Arrays for which VMEM has no room either are not divided.
    """
    num_bytes, d = num_rows * x.shape[1] * x.dtype.itemsize, x.shape[1]
    return 2 if MAX_GATHERED <= num_bytes < 2 * MAX_GATHERED and d % (4 * LANES) == 0 else 1


def grouped_operands(w1: Weight, v1: Weight, w2: Weight, block: BlockSizes) -> tuple[list[Array], list[Array]]:
    """Reshapes scales for the kernel; weights stay in their layout.

    Returns:
      Values of w1, v1 and w2; if quantised, scales of w1 and v1, (E, F / width, 1, width) per channel or
      (E, D / group, F), and of w2, (E, 1, D) or (E, F / group, D).
    """
    values = [stored_values(w) for w in (w1, v1, w2)]
    scales = [w.scale for w in (w1, v1, w2) if isinstance(w, QuantizedArray)]
    if scales and WeightFormat.of(w1).group is None:
        scales[:2] = [s.reshape(s.shape[0], -1, 1, block.width) for s in scales[:2]]
    elif scales:
        scales[:2] = [s.swapaxes(1, 2) for s in scales[:2]]
    return values, scales


def grouped_grid(
    rows: Sequence[Array],
    weights: list[Array],
    scales: list[Array],
    blocks: Blocks,
    block: BlockSizes,
    weight_format: WeightFormat,
) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid (blocks, tiles of F), the block specs of the operands, and the kernel's scratch memory."""
    w1, _, w2 = weights
    d, block_rows, dtype = w2.shape[2], block.tiles * ROW_TILE, rows[0].dtype
    values_per_byte = 2 if weight_format.packed else 1
    gate_up = pl.BlockSpec((None, block.width, w1.shape[2]), lambda b, t, expert, *_: (expert[b], t, 0))
    down = pl.BlockSpec((None, block.width // values_per_byte, d), lambda b, t, expert, *_: (expert[b], t, 0))
    parts, scale_specs = [pl.BlockSpec(memory_space=pl.ANY)] * len(rows), []
    scratch: list[Any] = [
        pltpu.VMEM((block_rows, d), dtype),
        pltpu.VMEM((block_rows, d), jnp.float32),
        *[pltpu.VMEM((ROW_TILE, block.width), jnp.float32)] * 2,
        pltpu.SemaphoreType.DMA((len(rows), block.tiles)),
    ]
    if scales:
        if weight_format.group is None:
            spec = pl.BlockSpec((None, None, 1, block.width), lambda b, t, expert, *_: (expert[b], t, 0, 0))
        else:
            spec = pl.BlockSpec((None, scales[0].shape[1], block.width), lambda b, t, expert, *_: (expert[b], 0, t))
        down_spec = pl.BlockSpec((None, *scales[2].shape[1:]), lambda b, t, expert, *_: (expert[b], 0, 0))
        scale_specs = [spec, spec, down_spec]
        scratch += [[pltpu.VMEM((block.width, d), dtype)] * 3]
    else:
        scratch += [[]]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(blocks.number, w1.shape[1] // block.width),
        in_specs=[parts, [gate_up, gate_up, down], scale_specs],
        out_specs=[parts],
        scratch_shapes=scratch,
    )


def _kernel(
    expert, first, count, rows, weights, scales, y, x, sums, gate, up, semaphores, dequantised, *, activation,
    weight_format,
):  # fmt: skip
    """Adds one tile of F to the sums of a block's rows; the first step reads the rows, the last writes the results."""
    b, t = pl.program_id(0), pl.program_id(1)
    is_first, is_last = t == 0, t == pl.num_programs(1) - 1

    def for_each_tile(body):
        lax.fori_loop(0, count[b], lambda i, _: body(i, pl.ds(pl.multiple_of(i * ROW_TILE, ROW_TILE), ROW_TILE)), None)

    def copies(i, tile, write: bool):
        tile_in_hbm = pl.ds(pl.multiple_of((first[b] + i) * ROW_TILE, ROW_TILE), ROW_TILE)
        for p, part in enumerate(y if write else rows):
            columns = pl.ds(p * part.shape[1], part.shape[1])
            ends = (x.at[tile, columns], part.at[tile_in_hbm]) if write else (part.at[tile_in_hbm], x.at[tile, columns])
            yield pltpu.make_async_copy(*ends, semaphores.at[p, i])

    def start(i, tile, write: bool):
        for copy in copies(i, tile, write):
            copy.start()

    def wait(i, tile, write: bool):
        for copy in copies(i, tile, write):
            copy.wait()

    @pl.when(is_first)
    def _():
        for_each_tile(partial(start, write=False))

    if dequantised:
        for w, s, target in zip(weights[:2], scales[:2], dequantised[:2], strict=True):
            _dequantise_gate_up(w, s, target, weight_format)
        _dequantise_down(weights[2], scales[2], dequantised[2], t, weight_format)
    matrices = dequantised or weights

    def add_tile(i, tile):
        @pl.when(is_first)
        def _():
            wait(i, tile, write=False)
            sums[tile] = jnp.zeros((ROW_TILE, sums.shape[1]), jnp.float32)

        _gate_up(x, tile, matrices[:2], scales[:2], (gate, up), weight_format)
        inner = (ACTIVATIONS[activation](gate[...]) * up[...]).astype(x.dtype)
        add_down = partial(_add_columns, sums, tile, inner, matrices[2])
        loop(sums.shape[1] // chunk_size(sums.shape[1]), add_down)

        @pl.when(is_last)
        def _():
            _store(x, tile, sums, scales[2] if scales and weight_format.group is None else None)
            start(i, tile, write=True)

    for_each_tile(add_tile)

    @pl.when(is_last)
    def _():
        for_each_tile(partial(wait, write=True))


def _gate_up(x, tile, weights, scales, results, weight_format: WeightFormat) -> None:
    """Stores x w1^T and x v1^T of a tile of rows in `results`, with scales per channel."""
    size = chunk_size(x.shape[1])
    for result in results:
        result[...] = jnp.zeros_like(result)

    def add_chunk(k):
        chunk = chunk_slice(k, size)
        for w, result in zip(weights, results, strict=True):
            result[...] += matmul(x[tile, chunk], w[:, chunk], 1)

    loop(x.shape[1] // size, add_chunk)
    if weight_format.scaled and weight_format.group is None:
        for s, result in zip(scales, results, strict=True):
            factor = s[...].astype(jnp.float32)
            result[...] = result[...] * (factor / INT4_FACTOR if weight_format.packed else factor)


def _add_columns(sums, tile, inner: Array, w2, k) -> None:
    """Adds inner w2 to chunk k of the columns of a tile's sums."""
    columns = chunk_slice(k, chunk_size(sums.shape[1]))
    sums[tile, columns] += matmul(inner, w2[:, columns], 0)


def _store(x, tile, sums, scale) -> None:
    """Writes a tile's sums, times the scales of the down projection per channel, over its rows."""
    size = chunk_size(x.shape[1])

    def store_chunk(k):
        columns = chunk_slice(k, size)
        total = sums[tile, columns]
        if scale is not None:
            total = total * scale[:, columns].astype(jnp.float32)
        x[tile, columns] = total.astype(x.dtype)

    loop(x.shape[1] // size, store_chunk)


def _dequantise_gate_up(w, scales, target, weight_format: WeightFormat) -> None:
    """Stores a tile of w1 or v1 in `target` (width, D), with scales per group; int4 columns are permuted."""
    size = 2 * LANES if weight_format.packed else chunk_size(target.shape[1])
    stored_size = size // 2 if weight_format.packed else size

    def store_chunk(k):
        stored = w[:, chunk_slice(k, stored_size)]
        values = unpack_even_odd(stored, target.dtype) if weight_format.packed else stored.astype(target.dtype)
        if weight_format.group is not None:
            factor = expand_row_scales(scales, k, size, weight_format.group)
            values = (values * factor).astype(target.dtype)
        target[:, chunk_slice(k, size)] = values

    loop(target.shape[1] // size, store_chunk)


def _dequantise_down(w2, scales, target, t, weight_format: WeightFormat) -> None:
    """Stores tile t of w2 in `target` (width, D), with scales per group."""
    size = chunk_size(target.shape[1])

    def store_chunk(k):
        columns = chunk_slice(k, size)
        stored = w2[:, columns]
        values = (pltpu.bitcast(stored, jnp.int4) if weight_format.packed else stored).astype(target.dtype)
        if weight_format.group is not None:
            factor = expand_column_scales(scales[:, columns], t * target.shape[0], target.shape[0], weight_format.group)
            values = (values * factor).astype(target.dtype)
        target[:, columns] = values

    loop(target.shape[1] // size, store_chunk)


def vmem_bytes(x: Float[Array, "N D"], w1: Weight, block: BlockSizes) -> int:
    """Returns the bytes of VMEM that the kernel needs: its scratch, two buffers of each tile, and a step's values."""
    weight_format, (_, width, d), itemsize = WeightFormat.of(w1), w1.shape, x.dtype.itemsize
    values = stored_values(w1)
    weights = 3 * 2 * block.width * values.shape[2] * values.dtype.itemsize
    rows = block.tiles * ROW_TILE * d * (itemsize + 4)
    products = 2 * ROW_TILE * (2 * block.width + CHUNK) * 4
    if weight_format.scaled:
        weights += 3 * block.width * d * itemsize + block.width * CHUNK * (4 + itemsize)
    if weight_format.group is not None:
        weights += 2 * scale_bytes(w1) * (2 * block.width + width) * d // weight_format.group
        weights += block.width * CHUNK * 4
    return weights + rows + products


def grouped_bytes(x: Float[Array, "N D"], w1: Weight, sizes: Sequence[int]) -> int:
    """Returns the HBM bytes that :func:`grouped_experts` reads and writes for experts with these numbers of rows.

    Each block reads its expert's weights and its rows, and writes as many. Without rows the first expert's are read.
    """
    block = block_sizes(x, w1)
    assert block is not None
    weight_bytes = 3 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w1)) // w1.shape[0]
    tiles = [-(-n // ROW_TILE) for n in sizes]
    num_blocks = sum(-(-n // block.tiles) for n in tiles)
    return max(num_blocks, 1) * weight_bytes + 2 * sum(tiles) * ROW_TILE * x.shape[1] * x.dtype.itemsize
