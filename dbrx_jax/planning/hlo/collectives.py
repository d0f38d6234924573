"""The collectives that a program runs, also those inside its fusions."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dbrx_jax.planning.hlo.cost import continued_collectives, result_type
from dbrx_jax.planning.hlo.running import COLLECTIVES, Scope, entry_scope, running
from dbrx_jax.planning.hlo.text import Computation, Instruction, Module, Shape, leaves


@dataclass(frozen=True)
class Collective:
    """A collective operation, as one device sees it."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
    operands: tuple[str, ...]  # such as "bf16[64,6144]"
    operand_bytes: int
    result_bytes: int
    group_size: int  # devices that take part together; of a collective-permute 2, who sends and who receives
    runs: int  # of the whole program; those of every branch of a conditional count
    op_name: str  # where in the Python program it comes from
    # Entry parameters (the path of the argument, such as "params['w']") that are an operand as they are: at most
    # moved, sliced, cast or reshaped. One that a loop changes is not, nor one that a gather indexes.
    parameters: tuple[str, ...]


def collectives(text: str, trips: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of a module, in the order of its computations.

    Args:
      text: of the module.
      trips: see :func:`hbm_traffic`.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    return [found for place in running(entry_scope(text), trips or {}) for found in _collectives(*place)]


def bytes_moved(collective: Collective) -> float:
    """Bytes that each device sends in one run, around a ring."""
    n, kind = collective.group_size, collective.kind
    full = collective.result_bytes if kind == "all-gather" else collective.operand_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return full
    return full * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _collectives(scope: Scope, instr: Instruction, runs: int) -> Iterator[Collective]:
    """The collectives in one instruction; a TPU puts some into fusions."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        yield _collective(scope, instr, opcode, leaves(result_type(instr)), instr.op_name, runs)
    elif instr.opcode == "fusion":
        body = scope.module.fusion_body(instr)
        carried = continued_collectives(scope, instr, body)
        inner = Scope(scope.module, Computation("", body), scope, instr)
        for op in body.values():
            if op.opcode in COLLECTIVES and op.name not in carried:
                users = [user for user in body.values() if op.name in user.operands]
                kind, results = op.opcode, users if op.opcode == "all-reduce" else []
                if results and all(user.opcode == "dynamic-slice" for user in results):
                    kind = "reduce-scatter"  # a TPU's all-reduce-scatter: each device keeps its slice
                else:
                    results = [op]
                shapes = [shape for result in results for shape in leaves(result.type)]
                yield _collective(inner, op, kind, shapes, op.op_name or instr.op_name, runs)


def _collective(
    scope: Scope, instr: Instruction, kind: str, results: list[Shape], op_name: str, runs: int
) -> Collective:
    operands = [leaf for name in instr.operands for leaf in leaves(scope.computation.instructions[name].type)]
    sources = [scope.source(name) for name in instr.operands]
    return Collective(
        kind=kind,
        operands=tuple(map(str, operands)),
        operand_bytes=sum(shape.bytes for shape in operands),
        result_bytes=sum(shape.bytes for shape in results),
        group_size=_group_size(scope.module, instr),
        runs=runs,
        op_name=op_name,
        parameters=tuple(
            made.op_name or made.name for at, made, _ in sources if made.opcode == "parameter" and at.outer is None
        ),
    )


def _group_size(module: Module, instr: Instruction) -> int:
    if instr.opcode.startswith("collective-permute"):
        return 2
    if sizes := instr.attribute(r"replica_groups=\[([\d,]+)\]<="):  # number of groups, devices in each
        return int(sizes.split(",")[1])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", instr.attributes
    ):  # axes, those of a group
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))  # of an axis a part: 'a':(before)size
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    groups = instr.attribute(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
    if groups is None:
        raise ValueError(f"cannot read the groups of this {instr.opcode}: {instr.attributes:.120}")
    return max((group.count(",") + 1 for group in re.findall(r"\{([^}]+)\}", groups)), default=module.num_devices)
