"""Tile sizes of the matmul kernels, which `python -m benchmarks.tiles` times and writes to tiles.json.

A kernel looks its matmul up by :func:`name_of`. Without a valid entry it chooses tile sizes by its own rule.
"""

import functools
import json
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")


@functools.cache
def table() -> dict[str, list[int]]:
    """Returns tile sizes by the matmul's name, in the order of the kernel's NamedTuple of tile sizes."""
    return {name: entry["tiles"] for name, entry in json.loads(TABLE.read_text()).items()}


def name_of(kernel: str, kind: str, group: int | None, sizes: tuple[int, ...], rows: int) -> str:
    """Names a matmul: "experts_tpu, int4 by 128, 10752 x 6144, 16 rows", with rows rounded up to a power of 2."""
    weights = kind if group is None else f"{kind} by {group}"
    return f"{kernel}, {weights}, {' x '.join(map(str, sizes))}, {1 << (max(rows, 8) - 1).bit_length()} rows"
