"""The bytes that one instruction reads from HBM and writes to it."""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dbrx_jax.planning.hlo.running import COLLECTIVES, CONTROL, FREE, Scope, channel
from dbrx_jax.planning.hlo.text import Computation, Instruction, Shape, Type, leaves, name_set

# An element of the result needs at most one of each operand.
_ELEMENTWISE = name_set(
    """abs acos acosh add and asin asinh atan2 atanh bitcast broadcast cbrt ceil clamp compare complex concatenate
    convert copy cos cosh cosine count-leading-zeros divide erf exponential exponential-minus-one floor
    get-tuple-element imag is-finite log log-plus-one logistic maximum minimum multiply negate not or pad popcnt
    power real reduce-precision remainder reshape reverse round-nearest-afz round-nearest-even rsqrt select
    shift-left shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-convert subtract tan tanh
    transpose xor"""
)
# It may need every element of the operands.
_WHOLE = COLLECTIVES | name_set(
    """cholesky convolution custom-call dot fft iota map ragged-dot reduce-window rng rng-bit-generator
    rng-get-and-update-state scaled-dot select-and-scatter sort topk triangular-solve tuple"""
)
_PART = name_set("reduce bitcast-convert")  # its share of them
_PICKS = name_set("slice dynamic-slice gather")
_UPDATES = name_set("dynamic-update-slice scatter")
_KNOWN = _ELEMENTWISE | _WHOLE | _PART | _PICKS | _UPDATES
_NOTHING = name_set("ConcatBitcast AllocateBuffer PrepareAsyncCallStart PrepareAsyncCallDone")


# A kernel of ours (kernels/cache_tpu.py) that writes its third operand into its fourth, whose buffer its result is.
_IN_PLACE = "/write_positions/"


@dataclass(frozen=True)
class _Cost:
    operands: list[int]  # bytes read from HBM
    results: list[int]  # bytes written to HBM, of each leaf of the result


def cost(scope: Scope, instr: Instruction) -> _Cost:
    """Bytes that one run of an instruction reads and writes."""
    shapes = leaves(result_type(instr))
    nothing = _Cost([], [0] * len(shapes))
    if instr.opcode in FREE or instr.opcode.endswith("-done") or instr.target in _NOTHING:
        return nothing
    if instr.opcode == "copy-start" and not _is_used(scope.computation, instr):
        return nothing  # brings a parameter to the chip for the next execution; this one's was counted at its start
    if instr.opcode == "custom-call" and _IN_PLACE in instr.op_name:
        new = sum(leaf.bytes for leaf in leaves(scope.computation.instructions[instr.operands[2]].type))
        return _Cost([new], [new])
    body = scope.module.fusion_body(instr) if instr.opcode == "fusion" else _alone(scope, instr)
    dead = functools.partial(_dies_at, scope, instr)
    carried = continued_collectives(scope, instr, body)
    sizes = [scope.computation.instructions[name].type for name in instr.operands]
    needed, results = _needs(instr, body, dead, carried)
    read: dict[str, int] = defaultdict(int)
    for number, (name, kind) in enumerate(zip(instr.operands, sizes, strict=True)):
        if isinstance(kind, Shape) and kind.in_hbm:
            read[name] = min(kind.bytes, read[name] + -(-int(needed.get(number, 0)) * kind.bits // 8))
        elif not isinstance(kind, Shape) and needed.get(number):
            read[name] = sum(leaf.bytes for leaf in leaves(kind) if leaf.in_hbm)
    written = [w if shape.in_hbm else 0 for w, shape in zip(results, shapes, strict=True)]
    if instr.opcode == "custom-call":
        return _kernel_cost(instr, list(read.values()), written)
    return _Cost(list(read.values()), written)


def _is_used(computation: Computation, start: Instruction) -> bool:
    dones = computation.users.get(start.name, [])
    return any(done.is_root or computation.users.get(done.name) for done in dones)


def _kernel_cost(instr: Instruction, read: list[int], written: list[int]) -> _Cost:
    if instr.target.startswith(("__cublas", "__cudnn")) and len(written) > 1:
        written = [*written[:-1], 0]  # their workspace
    return _Cost(read, written)


def result_type(instr: Instruction) -> Type:
    """Result type of the `done` that belongs to an asynchronous start."""
    opcode, kind = instr.opcode, instr.type
    if not opcode.endswith("-start") or isinstance(kind, Shape) or opcode in CONTROL:
        return kind
    if opcode == "copy-start":
        return kind[0]  # (result, operand, context)
    if opcode == "all-reduce-start":
        return kind
    return kind[1]  # (operands, results, contexts)


def _alone(scope: Scope, instr: Instruction) -> dict[str, Instruction]:
    """A plain instruction as the body of a fusion."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode not in _KNOWN:
        raise ValueError(f"the HLO has an instruction that is not known here: {instr.opcode} (%{instr.name})")
    body = {}
    for number, name in enumerate(instr.operands):
        kind = scope.computation.instructions[name].type
        body[f"/{number}"] = Instruction(f"/{number}", kind, "parameter", (), str(number), "", False)
    operands = tuple(f"/{number}" for number in range(len(instr.operands)))
    body["/root"] = dataclasses.replace(
        instr, name="/root", type=result_type(instr), opcode=opcode, operands=operands, is_root=False
    )
    return body


def continued_collectives(scope: Scope, instr: Instruction, body: dict[str, Instruction]) -> set[str]:
    """The collectives in a fusion that an earlier one started (a TPU computes while they run): counted there."""
    if instr.opcode != "fusion" or not any(op.opcode in COLLECTIVES for op in body.values()):
        return set()
    channels = scope.incoming_channels(instr, scope.async_channels)
    starting = {name for op in body.values() if op.target == "AsyncCollectiveStart" for name in op.operands}
    return {
        op.name
        for op in body.values()
        if op.opcode in COLLECTIVES and op.name not in starting and channel(op) in channels
    }


def _dies_at(scope: Scope, instr: Instruction, number: int) -> bool:
    """Returns whether an operand's buffer is dead afterwards, so that the result may reuse it."""
    base, path = scope.computation.resolve(instr.operands[number])
    if base.opcode == "parameter" and scope.outer is None and int(base.literal) not in scope.module.donated:
        return False
    if base.opcode == "constant":
        return False
    position = list(scope.computation.instructions).index(instr.name)
    last = scope.computation.last_use
    return all(last.get((base.name, path[:end]), -1) <= position for end in range(len(path) + 1))


def _needs(
    fusion: Instruction, body: dict[str, Instruction], dies: Callable[[int], bool], carried: set[str]
) -> tuple[dict[int, float], list[int]]:
    """Counts the elements that a fusion reads of each parameter, and the bytes it writes for each result."""
    computation = Computation("", body)
    need: dict[str, float] = defaultdict(float)
    results = []
    aliased = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+, ", _aliasing(fusion))}
    for number, (name, path) in enumerate(_result_leaves(computation, "/root", ())):
        made, inner = computation.resolve(name, path)
        shape = _at(made.type, inner)
        if made.opcode == "parameter" or made.name in carried:
            results.append(0)
        elif made.target.startswith("AsyncCollective"):
            results.append(0 if number in aliased else shape.bytes)
            need[made.name] = 1
        elif made.opcode in _UPDATES and _in_place(computation, made, dies):
            several = (len(made.operands) - 1) // 2 if made.opcode == "scatter" else 1
            updates = made.operands[several + 1 :] if made.opcode == "scatter" else made.operands[1:2]
            indices = made.operands[several : several + 1] if made.opcode == "scatter" else made.operands[2:]
            for operand in (*updates, *indices):
                need[operand] += _size(body[operand])
            results.append(leaves(body[updates[inner[0] if inner else 0]].type)[0].bytes)
        else:
            results.append(shape.bytes)
            need[made.name] += shape.size
    for instr in reversed(body.values()):
        wanted = min(need[instr.name], _size(instr))
        if wanted and instr.name not in carried:
            for operand, part in _operand_needs(instr, body, wanted):
                need[operand] += part
    parameters = [op for op in body.values() if op.opcode == "parameter"]
    return {int(op.literal): min(need[op.name], _size(op)) for op in parameters}, results


def _operand_needs(instr: Instruction, body: dict[str, Instruction], wanted: float) -> Sequence[tuple[str, float]]:
    opcode, size = instr.opcode, _size(instr)
    sizes = [(name, _size(body[name])) for name in instr.operands]
    if opcode in ("parameter", "constant", "iota", "partition-id", "replica-id"):
        return []
    if instr.target == "AsyncCollectiveDone":
        return []
    if opcode in _ELEMENTWISE:
        return [(name, min(n, wanted)) for name, n in sizes]
    if opcode in _PART:
        return [(name, min(n, wanted * max(n / size, 1))) for name, n in sizes]
    if opcode in _PICKS:
        return [(sizes[0][0], wanted), *sizes[1:]]
    if opcode in _UPDATES:  # not in place: the rest of the operand is read too
        return [(name, min(n, wanted)) for name, n in sizes]
    if opcode in _WHOLE:
        return sizes
    raise ValueError(f"the HLO has an instruction that is not known here: {opcode} (%{instr.name}, in a fusion)")


def _in_place(computation: Computation, update: Instruction, dies: Callable[[int], bool]) -> bool:
    base, _ = computation.resolve(update.operands[0])
    return base.opcode == "parameter" and dies(int(base.literal))


def _result_leaves(computation: Computation, name: str, path: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a result: of a tuple each of its operands."""
    made, path = computation.resolve(name, path)
    if made.opcode == "tuple":
        return [leaf for operand in made.operands for leaf in _result_leaves(computation, operand, ())]
    kind = _at(made.type, path)
    if isinstance(kind, Shape):
        return [(made.name, path)]
    return [leaf for i in range(len(kind)) for leaf in _result_leaves(computation, made.name, (*path, i))]


def _aliasing(instr: Instruction) -> str:
    return instr.attribute(r"output_to_operand_aliasing=(\{.*?\)\})") or ""


def _at(kind: Type, path: tuple[int, ...]) -> Any:
    for index in path:
        kind = kind[index]  # type: ignore[index]
    return kind


def _size(instr: Instruction) -> int:
    """Elements; of a tuple, of its first array."""
    shapes = leaves(instr.type)
    return shapes[0].size if shapes else 0
