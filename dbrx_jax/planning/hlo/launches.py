"""Kernels and copies that a GPU program launches."""

from collections.abc import Mapping
from dataclasses import dataclass

from dbrx_jax.planning.hlo.running import CONTROL, FREE, entry_scope, running
from dbrx_jax.planning.hlo.text import leaves


@dataclass(frozen=True)
class Launch:
    """An instruction that a GPU runs as a kernel or a copy of its own."""

    name: str
    opcode: str  # or a custom call's target
    result: str  # shapes
    op_name: str  # of the JAX operation that it comes from; a fusion has that of one of its operations, or none
    runs: int


def launches(text: str, trips: Mapping[str, int] | None = None) -> list[Launch]:
    """Returns the kernels and copies of one execution of a module, those of all branches included, in order.

    A custom call counts once, though a library's may launch several kernels. An asynchronous operation counts where
    it starts. Views, constants and control flow launch nothing. Copies of a loop's condition to the host, which XLA
    makes at run time, are not in the text.

    Args:
      text: of the module.
      trips: iterations of loops, as in :func:`dbrx_jax.planning.hlo.hbm_traffic`.
    """
    return [
        Launch(instr.name, instr.target or instr.opcode, ", ".join(map(str, leaves(instr.type))), instr.op_name, runs)
        for _, instr, runs in running(entry_scope(text), trips or {})
        if instr.opcode not in FREE | CONTROL and not instr.opcode.endswith("-done")
    ]
