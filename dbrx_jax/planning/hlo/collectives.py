"""Collectives that a program runs, including those inside fusions."""

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
    group_size: int  # devices; of a collective-permute 2, the sender and the receiver
    runs: int  # in the whole program, counting every branch of a conditional
    op_name: str  # its origin in the Python program
    # Entry parameters that are operands, at most moved, sliced, cast or reshaped, by the argument's path such as
    # "params['w']". Not those that a loop changes or a gather indexes.
    parameters: tuple[str, ...]


def collectives(text: str, trips: Mapping[str, int] | None = None) -> list[Collective]:
    """Returns the collectives of a module, in the order of its computations.

    Args:
      text: of the module.
      trips: as in :func:`hbm_traffic`.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    return [c for running_instr in running(entry_scope(text), trips or {}) for c in _collectives(*running_instr)]


def bytes_moved(collective: Collective) -> float:
    """Returns the bytes that each device sends in one run of a ring algorithm."""
    n, kind = collective.group_size, collective.kind
    full = collective.result_bytes if kind == "all-gather" else collective.operand_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return full
    return full * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _collectives(scope: Scope, instr: Instruction, runs: int) -> Iterator[Collective]:
    """Yields the collectives in one instruction; a TPU puts some into fusions."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        yield _collective(scope, instr, opcode, leaves(result_type(instr)), instr.op_name, runs)
    elif opcode == "fusion":
        body = scope.module.fusion_body(instr)
        continued = continued_collectives(scope, instr, body)
        inner = Scope(scope.module, Computation("", body), scope, instr)
        for op in body.values():
            if op.opcode in COLLECTIVES and op.name not in continued:
                kind, results = op.opcode, [op]
                users = inner.computation.users.get(op.name, [])
                if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
                    kind, results = "reduce-scatter", users  # a TPU's all-reduce-scatter: each device keeps its slice
                shapes = [shape for result in results for shape in leaves(result.type)]
                yield _collective(inner, op, kind, shapes, op.op_name or instr.op_name, runs)


def _collective(
    scope: Scope, instr: Instruction, kind: str, results: list[Shape], op_name: str, runs: int
) -> Collective:
    instructions = scope.computation.instructions
    operands = [leaf for name in instr.operands for leaf in leaves(instructions[name].type)]
    parameters = []
    for name in instr.operands:
        source_scope, source, _ = scope.source(name)
        if source.opcode == "parameter" and source_scope.outer is None:
            parameters.append(source.op_name or source.name)
    return Collective(
        kind=kind,
        operands=tuple(map(str, operands)),
        operand_bytes=sum(shape.bytes for shape in operands),
        result_bytes=sum(shape.bytes for shape in results),
        group_size=_group_size(scope.module, instr),
        runs=runs,
        op_name=op_name,
        parameters=tuple(parameters),
    )


def _group_size(module: Module, instr: Instruction) -> int:
    """Returns the number of devices in a collective's groups."""
    if instr.opcode.startswith("collective-permute"):
        return 2
    if sizes := instr.attribute(r"replica_groups=\[([\d,]+)\]<="):  # number of groups, devices per group
        return int(sizes.split(",")[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", instr.attributes)
    if mesh:  # sizes of all axes; axes of a group, or parts of axes: 'a':(before)size
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        group_axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or axes[axis]) for axis, part in group_axes)
    groups = instr.attribute(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
    if groups is None:
        raise ValueError(f"cannot read the groups of this {instr.opcode}: {instr.attributes:.120}")
    return max((group.count(",") + 1 for group in re.findall(r"\{([^}]+)\}", groups)), default=module.num_devices)
