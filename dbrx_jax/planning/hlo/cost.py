"""HBM traffic of a single instruction."""

import dataclasses
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from dbrx_jax.planning.hlo.running import COLLECTIVES, CONTROL, FREE, Scope, channel
from dbrx_jax.planning.hlo.text import Computation, Instruction, Shape, TuplePath, Type, leaves, name_set

# An element of the result needs at most one element of each operand.
_ELEMENTWISE = name_set(
    """abs acos acosh add and asin asinh atan2 atanh bitcast broadcast cbrt ceil clamp compare complex concatenate
    convert copy cos cosh cosine count-leading-zeros divide erf exponential exponential-minus-one floor
    get-tuple-element imag is-finite log log-plus-one logistic maximum minimum multiply negate not or pad popcnt
    power real reduce-precision remainder reshape reverse round-nearest-afz round-nearest-even rsqrt select
    shift-left shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-convert subtract tan tanh
    transpose xor"""
)
# An element of the result may need every element of the operands.
_READ_ALL = COLLECTIVES | name_set(
    """cholesky convolution custom-call dot fft iota map ragged-dot reduce-window rng rng-bit-generator
    rng-get-and-update-state scaled-dot select-and-scatter sort topk triangular-solve tuple"""
)
_PROPORTIONAL = name_set("reduce bitcast-convert")  # a part of the result needs the same part of the operands
_SLICES = name_set("slice dynamic-slice gather")
_UPDATES = name_set("dynamic-update-slice scatter")
_KNOWN = _ELEMENTWISE | _READ_ALL | _PROPORTIONAL | _SLICES | _UPDATES
_SOURCES = name_set("parameter constant iota partition-id replica-id")
_FREE_TARGETS = name_set("ConcatBitcast AllocateBuffer PrepareAsyncCallStart PrepareAsyncCallDone")
# Kernels of kernels/tpu/cache_write.py that write their third operand into their fourth, whose buffer is the result's.
_IN_PLACE_KERNELS = ("/write_positions/", "/write_scales/")
# The kernels of kernels/*/cache_attention.py. Operands are integers (a table of blocks is the largest), queries, and
# pools of blocks (N, G, P, K). If a result is in a pool's buffer, each row's new position is written there.
_PAGED_KERNEL = "/cache_attention/"


@dataclass(frozen=True)
class Cost:
    """HBM traffic in bytes."""

    read: int
    written: list[int]  # of each array of the result


def cost(scope: Scope, instr: Instruction) -> Cost:
    """Returns the bytes that one run of an instruction reads and writes."""
    instructions, users = scope.computation.instructions, scope.computation.users
    shapes = leaves(result_type(instr))
    free = Cost(0, [0] * len(shapes))
    if instr.opcode in FREE or instr.opcode.endswith("-done") or instr.target in _FREE_TARGETS:
        return free
    dones = users.get(instr.name, ())
    if instr.opcode == "copy-start" and not any(done.is_root or done.name in users for done in dones):
        return free  # prefetches a parameter for the next execution, whose first copy is counted at the start
    if instr.opcode == "custom-call" and any(name in instr.op_name for name in _IN_PLACE_KERNELS):
        num_bytes = sum(leaf.bytes for leaf in leaves(instructions[instr.operands[2]].type))
        return Cost(num_bytes, [num_bytes])
    elements, written = _accesses(scope, instr)
    if instr.opcode == "custom-call" and _PAGED_KERNEL in instr.op_name:
        operands = [leaves(instructions[name].type)[0] for name in instr.operands]
        elements |= _elements_of_pools(operands)
        rows = max((shape for shape in operands if shape.dtype == "s32"), key=lambda shape: shape.size).dims[0]
        for index in _aliased(instr):
            blocks, _, positions = shapes[index].dims[:3]
            written[index] = rows * shapes[index].bytes // (blocks * positions)
    read: dict[str, int] = defaultdict(int)
    for index, name in enumerate(instr.operands):
        type_ = instructions[name].type
        if isinstance(type_, Shape) and type_.in_hbm:
            read[name] = min(type_.bytes, read[name] + -(-int(elements.get(index, 0)) * type_.bits // 8))
        elif not isinstance(type_, Shape) and elements.get(index):
            read[name] = sum(leaf.bytes for leaf in leaves(type_) if leaf.in_hbm)
    written = [n if shape.in_hbm else 0 for n, shape in zip(written, shapes, strict=True)]
    if instr.target.startswith(("__cublas", "__cudnn")) and len(written) > 1:
        written[-1] = 0  # the workspace
    return Cost(sum(read.values()), written)


def _elements_of_pools(operands: list[Shape]) -> dict[int, float]:
    """Returns the elements that a paged kernel reads of each pool at most: those of as many blocks as its table has."""
    integers = [shape.size for shape in operands if shape.dtype == "s32"]
    pools = range(len(integers) + 1, len(operands))
    return {i: operands[i].size * min(1, max(integers) / operands[i].dims[0]) for i in pools}


def result_type(instr: Instruction) -> Type:
    """Returns the type of a result; for an asynchronous start, that of the matching `done`."""
    opcode, type_ = instr.opcode, instr.type
    if not opcode.endswith("-start") or isinstance(type_, Shape) or opcode in CONTROL or opcode == "all-reduce-start":
        return type_
    return type_[0] if opcode == "copy-start" else type_[1]  # (result, operand, context) or (operands, results, ...)


def continued_collectives(scope: Scope, instr: Instruction, body: dict[str, Instruction]) -> set[str]:
    """Returns the collectives in a fusion that an earlier fusion started, and that are counted there.

    A TPU computes while they run.
    """
    if instr.opcode != "fusion" or not any(op.opcode in COLLECTIVES for op in body.values()):
        return set()
    channels = scope.incoming_channels(instr, scope.async_channels)
    starting = {name for op in body.values() if op.target == "AsyncCollectiveStart" for name in op.operands}
    collectives = {op.name for op in body.values() if op.opcode in COLLECTIVES and channel(op) in channels}
    return collectives - starting


def _accesses(scope: Scope, instr: Instruction) -> tuple[dict[int, float], list[int]]:
    """Counts the elements that an instruction reads of each operand, and the bytes that it writes for each result."""
    body = scope.module.fusion_body(instr) if instr.opcode == "fusion" else _single_instruction_body(scope, instr)
    continued = continued_collectives(scope, instr, body)
    aliased = _aliased(instr)
    computation = Computation("", body)
    needed: dict[str, float] = defaultdict(float)  # elements by name
    written = []
    for index, (producer, path, shape) in enumerate(_result_leaves(computation, "/root")):
        if producer.opcode == "parameter" or producer.name in continued:
            written.append(0)
        elif producer.target.startswith("AsyncCollective"):
            written.append(0 if index in aliased else shape.bytes)
            needed[producer.name] = 1
        elif producer.opcode in _UPDATES and _is_in_place(scope, instr, computation, producer):
            # Operands of a scatter: arrays, indices, updates; of a dynamic-update-slice: array, update, indices.
            num_arrays, first_update = 1, 1
            if producer.opcode == "scatter":
                num_arrays = (len(producer.operands) - 1) // 2
                first_update = num_arrays + 1
            for name in producer.operands[num_arrays:]:
                needed[name] += _size(body[name])
            update = producer.operands[first_update + (path[0] if path else 0)]
            written.append(leaves(body[update].type)[0].bytes)
        else:
            written.append(shape.bytes)
            needed[producer.name] += shape.size
    for op in reversed(body.values()):
        num_elements = min(needed[op.name], _size(op))
        if num_elements and op.name not in continued:
            for name, operand_elements in _operand_elements(op, body, num_elements):
                needed[name] += operand_elements
    parameters = [op for op in body.values() if op.opcode == "parameter"]
    return {int(op.literal): min(needed[op.name], _size(op)) for op in parameters}, written


def _aliased(instr: Instruction) -> set[int]:
    """Returns the numbers of the results that are in an operand's buffer."""
    aliasing = instr.attribute(r"output_to_operand_aliasing=(\{.*?\)\})") or ""
    return {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+, ", aliasing)}


def _single_instruction_body(scope: Scope, instr: Instruction) -> dict[str, Instruction]:
    """Wraps an instruction as the body of a fusion."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode not in _KNOWN:
        raise ValueError(f"the HLO has an instruction that is not known here: {instr.opcode} (%{instr.name})")
    body = {}
    for index, name in enumerate(instr.operands):
        type_ = scope.computation.instructions[name].type
        body[f"/{index}"] = Instruction(f"/{index}", type_, "parameter", (), str(index), "", False)
    body["/root"] = dataclasses.replace(
        instr, name="/root", type=result_type(instr), opcode=opcode, operands=tuple(body), is_root=False
    )
    return body


def _operand_elements(instr: Instruction, body: dict[str, Instruction], num_elements: float) -> list[tuple[str, float]]:
    """Returns the elements of each operand that are read for a number of elements of the result."""
    opcode, size = instr.opcode, _size(instr)
    if opcode in _SOURCES or instr.target == "AsyncCollectiveDone":
        return []
    sizes: list[tuple[str, float]] = [(name, _size(body[name])) for name in instr.operands]
    if opcode in _ELEMENTWISE or opcode in _UPDATES:  # an update here is not in place: the rest of its array is read
        return [(name, min(n, num_elements)) for name, n in sizes]
    if opcode in _PROPORTIONAL:
        return [(name, min(n, num_elements * max(n / size, 1))) for name, n in sizes]
    if opcode in _SLICES:
        return [(sizes[0][0], num_elements), *sizes[1:]]
    if opcode in _READ_ALL:
        return sizes
    raise ValueError(f"the HLO has an instruction that is not known here: {opcode} (%{instr.name}, in a fusion)")


def _is_in_place(scope: Scope, instr: Instruction, computation: Computation, update: Instruction) -> bool:
    """Returns whether an update writes into its operand's buffer: a parameter's that nothing reads afterwards."""
    parameter, _ = computation.resolve(update.operands[0])
    if parameter.opcode != "parameter":
        return False
    base, path = scope.computation.resolve(instr.operands[int(parameter.literal)])
    is_argument = base.opcode == "parameter" and scope.outer is None
    if base.opcode == "constant" or (is_argument and int(base.literal) not in scope.module.donated):
        return False
    index = list(scope.computation.instructions).index(instr.name)
    last_use = scope.computation.last_use
    return all(last_use.get((base.name, path[:end]), -1) <= index for end in range(len(path) + 1))


def _result_leaves(
    computation: Computation, name: str, path: TuplePath = ()
) -> list[tuple[Instruction, TuplePath, Shape]]:
    """Returns the arrays of a result: the instruction that produces each, and its path and shape there."""
    instr, path = computation.resolve(name, path)
    if instr.opcode == "tuple":
        return [leaf for operand in instr.operands for leaf in _result_leaves(computation, operand)]
    type_: Any = instr.type
    for index in path:
        type_ = type_[index]
    if isinstance(type_, Shape):
        return [(instr, path, type_)]
    return [leaf for i in range(len(type_)) for leaf in _result_leaves(computation, instr.name, (*path, i))]


def _size(instr: Instruction) -> int:
    """Returns the number of elements; of a tuple, that of its first array."""
    shapes = leaves(instr.type)
    return shapes[0].size if shapes else 0
