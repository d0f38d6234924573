"""Parser of HLO text: a module of computations of instructions, with the shapes of their results."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias


def name_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = name_set("bitcast get-tuple-element tuple")

_BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_NARROW_DTYPE = re.compile(r"[su][1248]|f[48]e\w+")  # a byte per element unless the layout packs them: E(4)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_IGNORED_LINE = re.compile(r"HloModule |\d+ |FileNames$|FunctionNames$|FileLocations$|StackFrames$|$")


@dataclass(frozen=True)
class Shape:
    """An array's dtype, dimensions and memory space."""

    dtype: str
    dims: tuple[int, ...]
    bits: int  # per element
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Type: TypeAlias = "Shape | tuple[Type, ...]"
TuplePath: TypeAlias = tuple[int, ...]  # of tuple indices that lead to an element of a result


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction; its operands are the names of other instructions."""

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    literal: str  # text between the brackets: a constant's value, a parameter's number
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression that is searched in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @functools.cached_property
    def op_name(self) -> str:
        return re.sub(r"\\(.)", r"\1", self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "")

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"') or ""


@dataclass(eq=False)
class Computation:
    """Instructions by name, in the order of execution."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(instr for instr in self.instructions.values() if instr.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instr in self.instructions.values():
            for name in instr.operands:
                users[name].append(instr)
        return users

    @functools.cached_property
    def last_use(self) -> dict[tuple[str, TuplePath], int]:
        """Index of the last instruction that reads each value, directly or through a view."""
        last_use: dict[tuple[str, TuplePath], int] = {}
        for index, instr in enumerate(self.instructions.values()):
            if instr.opcode not in VIEWS or instr.is_root:
                pending = [self.resolve(name) for name in instr.operands]
                while pending:
                    base, path = pending.pop()
                    if base.opcode == "tuple":
                        pending += [self.resolve(name) for name in base.operands]
                    last_use[base.name, path] = index
        return last_use

    def resolve(self, name: str, path: TuplePath = ()) -> tuple[Instruction, TuplePath]:
        """Follows views to the instruction that produces a value, and the value's path in its result."""
        instr = self.instructions[name]
        if instr.opcode == "get-tuple-element":
            return self.resolve(instr.operands[0], (int(instr.attribute(r"index=(\d+)") or 0), *path))
        if instr.opcode == "tuple" and path:
            return self.resolve(instr.operands[path[0]], path[1:])
        if instr.opcode == "bitcast":
            return self.resolve(instr.operands[0], path)
        return instr, path

    def is_invariant(self, index: int) -> bool:
        """Returns whether this loop body passes an element of its tuple through unchanged."""
        instr, path = self.resolve(self.root.name, (index,))
        while instr.opcode == "copy":
            instr, path = self.resolve(instr.operands[0], path)
        return instr.opcode == "parameter" and path == (index,)


class Module:
    """A parsed HLO module.

    Raises:
      ValueError: the text cannot be parsed; the message has the line.
    """

    def __init__(self, text: str):
        lines = text.splitlines()
        if not lines or not lines[0].startswith("HloModule "):
            raise ValueError("not the text of an HLO module: it does not start with HloModule")
        self.header = lines[0]
        self.is_tpu = ":T(" in text  # only TPU layouts have tiles
        self.computations: dict[str, Computation] = {}
        self._fusion_bodies: dict[str, dict[str, Instruction]] = {}
        entry = current = None
        for line in lines:
            if current is None:
                if match := _COMPUTATION.match(line):
                    current = self.computations[match[2]] = Computation(match[2], {})
                    entry = current if match[1] else entry
                elif not _IGNORED_LINE.match(line):
                    raise ValueError(f"cannot read this line of HLO: {line:.120}")
            elif line.startswith("}"):
                current = None
            else:
                instr = self._parse_instruction(line)
                current.instructions[instr.name] = instr
        if entry is None:
            raise ValueError("the HLO module has no ENTRY computation")
        self.entry = entry

    def _parse_instruction(self, line: str) -> Instruction:
        match = _INSTRUCTION.match(_COMMENT.sub("", line))
        if not match:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        root, name, text = match.groups()
        type_, type_end = self._parse_type(text, 0)
        match = _OPCODE.match(text, type_end)
        if not match:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        opcode, start, stop = match[1], match.end(), _closing_bracket(text, match.end())
        literal = text[start:stop]
        if opcode == "fusion-start" and not isinstance(type_, Shape):  # an asynchronous fusion: (operands, result)
            opcode, type_ = "fusion", type_[1]
        elif opcode == "fusion-done":
            opcode = "bitcast"
        operands = re.findall(r"%([^\s,()]+)", literal) if opcode != "constant" else ()
        return Instruction(name, type_, opcode, tuple(operands), literal, text[stop + 1 :], bool(root))

    def _parse_type(self, text: str, start: int) -> tuple[Type, int]:
        """Parses the type at offset `start`; returns it and the offset of its end."""
        if text[start] == "(":
            elements, end = [], start + 1
            while text[end] != ")":
                if text[end] in ", ":
                    end += 1
                else:
                    element, end = self._parse_type(text, end)
                    elements.append(element)
            return tuple(elements), end + 1
        match = _ARRAY.match(text, start)
        if not match:
            raise ValueError(f"cannot read this type of HLO: {text[start : start + 80]}")
        dtype, dims, layout = match[1], match[2], match[3] or ""
        bits = _BITS.get(dtype)
        if bits is None:
            if not _NARROW_DTYPE.fullmatch(dtype):
                raise ValueError(f"the HLO has an element type that is not known here: {dtype}")
            packed = re.search(r"E\((\d+)\)", layout)
            bits = int(packed[1]) if packed else 8
        # Space 0 is HBM. On a TPU other spaces are on the chip or, 5, the host's. On a GPU only the host's is
        # elsewhere: 1 is HBM that NCCL knows.
        space = re.search(r"S\((\d+)\)", layout)
        in_hbm = space is None or space[1] == "0" or (not self.is_tpu and space[1] != "5")
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        return Shape(dtype, sizes, bits, in_hbm), match.end()

    @functools.cached_property
    def num_devices(self) -> int:
        return math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", self.header)))

    @functools.cached_property
    def donated(self) -> set[int]:
        """Numbers of the parameters whose buffers the results may reuse."""
        match = re.search(r"input_output_alias=\{(.*?)\}, \w+=", self.header + ", end=")
        return {int(n) for n in re.findall(r": \((\d+),", match[1])} if match else set()

    def called(self, instr: Instruction, key: str) -> Computation:
        """Returns the computation that an instruction's attribute `key` names."""
        name = instr.attribute(rf"\b{key}=%?([^\s,]+)")
        if name is None:
            raise ValueError(f"this HLO {instr.opcode} has no {key}: %{instr.name}")
        return self.computations[name]

    def fusion_body(self, instr: Instruction) -> dict[str, Instruction]:
        """Returns the instructions of a fusion, with nested fusions inlined; the last is the root, "/root"."""
        fused = self.called(instr, "calls")
        if fused.name not in self._fusion_bodies:
            body = self._inline(fused)
            root = body[fused.root.name]
            body["/root"] = dataclasses.replace(root, name="/root", opcode="bitcast", operands=(root.name,))
            self._fusion_bodies[fused.name] = body
        return self._fusion_bodies[fused.name]

    def _inline(
        self, computation: Computation, prefix: str = "", arguments: tuple[str, ...] | None = None
    ) -> dict[str, Instruction]:
        """Returns a computation's instructions with prefixed names; `arguments` replace its parameters."""
        body: dict[str, Instruction] = {}
        for instr in computation.instructions.values():
            name, opcode, operands = prefix + instr.name, instr.opcode, tuple(prefix + o for o in instr.operands)
            if opcode == "fusion":
                fused = self.called(instr, "calls")
                body |= self._inline(fused, f"{name}/", operands)
                opcode, operands = "bitcast", (f"{name}/{fused.root.name}",)
            elif opcode == "parameter" and arguments is not None:
                opcode, operands = "bitcast", (arguments[int(instr.literal)],)
            body[name] = dataclasses.replace(instr, name=name, opcode=opcode, operands=operands, is_root=False)
        return body


def _closing_bracket(text: str, start: int) -> int:
    """Returns the offset of the bracket that closes the one before `start`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"cannot read this HLO, a bracket stays open: {text:.120}")


def leaves(type_: Type) -> list[Shape]:
    """Returns the arrays of a type, those of nested tuples in order."""
    return [type_] if isinstance(type_, Shape) else [leaf for element in type_ for leaf in leaves(element)]
