"""Registers, spills and instructions of kernels for Hopper GPUs, from what Pallas writes while it compiles them.

Needs nvdisasm, which the extra [compile] brings.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def find_nvdisasm() -> bool:
    """Returns whether nvdisasm is there; adds the folder of its package to PATH if it is."""
    if shutil.which("nvdisasm"):
        return True
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or [] if package else []:
        for folder in Path(root).glob("cu*/bin"):
            if (folder / "nvdisasm").exists():
                os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
                return True
    return False


class Dumped(NamedTuple):
    """Facts of the kernels that were compiled in a block.

    Attributes:
      loops: instructions of main loops, by kernel; kernels without a loop of matrix products are left out.
      resources: the assembler's reports of registers and spills.
    """

    loops: dict[str, int]
    resources: list[str]


@contextlib.contextmanager
def dumped_kernels() -> Iterator[Dumped]:
    """Lets compiles in the block write their assembly; the facts are complete when it has ended."""
    found = Dumped({}, [])
    with tempfile.TemporaryDirectory() as folder:
        changes = {name: "1" for name in ("MOSAIC_GPU_DUMP_SASS", "MOSAIC_GPU_DUMP_PTXAS")}
        changes["MOSAIC_GPU_DUMP_TO"] = folder
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield found
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        for path in sorted(Path(folder).glob("*.sass_ctrl")):
            if count := main_loop(path.read_text()):
                found.loops[re.sub(r"_\d+$", "", path.stem)] = count
        found.resources.extend(path.read_text() for path in sorted(Path(folder).glob("*.ptxas")))


def main_loop(text: str) -> int:
    """Returns the number of instructions of the shortest loop with products of the matrix unit; 0 without one."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*$", line):
            instructions.append(found[1])
    loops = []
    for end, instruction in enumerate(instructions):
        branch = re.search(r"BRA.*?(\.L_x_\w+)", instruction)
        start = labels.get(branch[1], end + 1) if branch else end + 1
        if any("GMMA" in i for i in instructions[start : end + 1]):
            loops.append(end + 1 - start)
    return min(loops, default=0)
