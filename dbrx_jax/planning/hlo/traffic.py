"""The bytes that a whole program moves between HBM and the chip, and its largest buffers."""

from collections.abc import Mapping
from dataclasses import dataclass

from dbrx_jax.planning.hlo.cost import cost, result_type
from dbrx_jax.planning.hlo.running import CONTROL, Scope, called_scopes, entry_scope, running
from dbrx_jax.planning.hlo.text import Module, leaves


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


def hbm_traffic(text: str, trips: Mapping[str, int] | None = None) -> Traffic:
    """The HBM traffic of one execution of a module.

    Every executed instruction reads its operands and writes its results once, where those are in HBM. Of what
    is only sliced or gathered from, the slice counts; of an update in place, the update. Of a conditional the
    largest branch counts. A custom call (a kernel) reads all of its operands and writes all of its results once:
    what it estimates of itself is not asked for. (Of ours tests show that it is so, but for the one that writes
    positions into a cache in place, of which those count.) A collective reads its operand and writes its result once.

    Args:
      text: of the module.
      trips: regular expression -> iterations, for loops whose number the program does not know; the first that
        is found in the loop's op_name (such as "jit(decode)/while") counts. Loops that count from a constant
        to a constant need none; any other runs once.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    module = Module(text)
    counted = _traffic(Scope(module, module.entry), trips or {})
    by_op = {key: read + written for key, (read, written) in counted.items()}
    return Traffic(
        read=sum(read for read, _ in counted.values()),
        written=sum(written for _, written in counted.values()),
        by_op=dict(sorted(by_op.items(), key=lambda item: -item[1])),
    )


def largest_temporaries(text: str, n: int | None = None) -> list[Temporary]:
    """The `n` largest (None is all) results in HBM of instructions that are no parameters, views or updates in place.

    Outputs of the program are among them. A loop's body counts once: its buffers are used again.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    found = []
    for scope, instr, _ in running(entry_scope(text), {}):
        if instr.opcode not in CONTROL:
            shapes = leaves(result_type(instr))
            for shape, written in zip(shapes, cost(scope, instr).results, strict=True):
                if written == shape.bytes > 0:
                    found.append(Temporary(shape.bytes, str(shape), instr.opcode, instr.op_name))
    return sorted(found, key=lambda temporary: -temporary.bytes)[:n]


def _traffic(scope: Scope, trips: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Opcode and op_name -> bytes read, bytes written."""
    result: dict[str, tuple[int, int]] = {}

    def add(more: Mapping[str, tuple[int, int]], times: int) -> None:
        for key, (read, written) in more.items():
            before = result.get(key, (0, 0))
            result[key] = (before[0] + times * read, before[1] + times * written)

    for instr in scope.computation.instructions.values():
        inner = [(_traffic(called, trips), times) for called, times in called_scopes(scope, instr, trips)]
        if instr.opcode == "conditional":
            inner = [max(inner, key=lambda branch: sum(map(sum, branch[0].values())))]
        for called, times in inner:
            add(called, times)
        if instr.opcode not in CONTROL:
            own = cost(scope, instr)
            if any(own.operands) or any(own.results):
                key = f"{instr.opcode} {instr.op_name}".strip()
                add({key: (sum(own.operands), sum(own.results))}, 1)
    return result
