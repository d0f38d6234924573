"""HBM traffic and largest buffers of a whole program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbrx_jax.planning.hlo.cost import cost, result_type
from dbrx_jax.planning.hlo.running import CONTROL, Scope, called_scopes, entry_scope, running
from dbrx_jax.planning.hlo.text import leaves


@dataclass(frozen=True)
class Traffic:
    """Bytes between HBM and the chip in one execution, on one device."""

    read: int
    written: int
    by_op: dict[str, int]  # read and written together by opcode and op_name, largest first


@dataclass(frozen=True)
class Temporary:
    """A buffer in HBM that an instruction writes."""

    bytes: int
    shape: str
    opcode: str
    op_name: str


def hbm_traffic(text: str, trips: Mapping[str, int] | None = None, branch: Callable[..., Any] = max) -> Traffic:
    """Returns the HBM traffic of one execution of a module.

    Every executed instruction reads its operands and writes its results once, where those are in HBM. Only the
    slice counts of what is sliced or gathered from, and only the update of an update in place. A custom call (a
    kernel) reads all of its operands and writes all of its results once. There are two exceptions: of the kernel that
    writes positions into a cache in place, those count; and attention reads as many blocks of a paged cache as its
    table has entries. A collective reads its operand and writes its result once.

    Args:
      text: of the module.
      trips: regular expression -> iterations, for loops whose number the program does not know; the first that
        is found in the loop's op_name (such as "jit(decode)/while") counts. Loops that count from a constant
        to a constant need none; any other runs once.
      branch: `max` or `min`: a conditional counts as its branch with the most or the least traffic.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    by_op = _traffic_by_op(entry_scope(text), trips or {}, branch)
    totals = {op: read + written for op, (read, written) in by_op.items()}
    return Traffic(
        read=sum(read for read, _ in by_op.values()),
        written=sum(written for _, written in by_op.values()),
        by_op=dict(sorted(totals.items(), key=lambda item: -item[1])),
    )


def largest_temporaries(text: str, n: int | None = None) -> list[Temporary]:
    """Returns the `n` largest (None: all) results in HBM, except parameters, views and updates in place.

    Outputs of the program are among them. A loop's body counts once, as its buffers are reused.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    temporaries = []
    for scope, instr, _ in running(entry_scope(text), {}):
        if instr.opcode not in CONTROL:
            for shape, written in zip(leaves(result_type(instr)), cost(scope, instr).written, strict=True):
                if written == shape.bytes > 0:
                    temporaries.append(Temporary(shape.bytes, str(shape), instr.opcode, instr.op_name))
    return sorted(temporaries, key=lambda temporary: -temporary.bytes)[:n]


def _traffic_by_op(scope: Scope, trips: Mapping[str, int], branch: Callable[..., Any]) -> dict[str, tuple[int, int]]:
    """Returns the bytes read and written, by opcode and op_name."""
    by_op: dict[str, tuple[int, int]] = {}
    for instr in scope.computation.instructions.values():
        calls = [(_traffic_by_op(inner, trips, branch), runs) for inner, runs in called_scopes(scope, instr, trips)]
        if instr.opcode == "conditional":
            calls = [branch(calls, key=lambda call: sum(map(sum, call[0].values())))]
        if instr.opcode not in CONTROL:
            instr_cost = cost(scope, instr)
            read, written = instr_cost.read, sum(instr_cost.written)
            if read or written:
                calls.append(({f"{instr.opcode} {instr.op_name}".strip(): (read, written)}, 1))
        for traffic, runs in calls:
            for op, (read, written) in traffic.items():
                total_read, total_written = by_op.get(op, (0, 0))
                by_op[op] = (total_read + runs * read, total_written + runs * written)
    return by_op
