"""The parser: a module's text as computations of instructions, whose results have shapes."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = words("bitcast get-tuple-element tuple")

_BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_NARROW = re.compile(r"[su][1248]|f[48]e\w+")  # a byte each unless the layout packs them: E(4)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_BETWEEN = re.compile(r"HloModule |\d+ |FileNames$|FunctionNames$|FileLocations$|StackFrames$|$")


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    bits: int  # of one element
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


@dataclass(frozen=True, eq=False)
class Instr:
    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    literal: str  # the text in the brackets
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @functools.cached_property
    def op_name(self) -> str:
        return re.sub(r"\\(.)", r"\1", self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "")

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"') or ""


@dataclass(eq=False)
class Computation:
    name: str
    instrs: dict[str, Instr]  # in the order of execution

    @functools.cached_property
    def root(self) -> Instr:
        return next(instr for instr in self.instrs.values() if instr.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instr]]:
        found: dict[str, list[Instr]] = defaultdict(list)
        for instr in self.instrs.values():
            for name in instr.operands:
                found[name].append(instr)
        return found

    @functools.cached_property
    def last_use(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """The position of the last instruction that reads each value, views of it included."""
        found: dict[tuple[str, tuple[int, ...]], int] = {}
        for position, instr in enumerate(self.instrs.values()):
            if instr.opcode not in VIEWS or instr.is_root:
                pending = [self.resolve(name) for name in instr.operands]
                while pending:
                    base, path = pending.pop()
                    if base.opcode == "tuple":
                        pending += [self.resolve(name) for name in base.operands]
                    found[base.name, path] = position
        return found

    def resolve(self, name: str, path: tuple[int, ...] = ()) -> tuple[Instr, tuple[int, ...]]:
        """The instruction that made a value, and where in its result it is; seen through views."""
        instr = self.instrs[name]
        if instr.opcode == "get-tuple-element":
            return self.resolve(instr.operands[0], (_index(instr), *path))
        if instr.opcode == "tuple" and path:
            return self.resolve(instr.operands[path[0]], path[1:])
        if instr.opcode == "bitcast":
            return self.resolve(instr.operands[0], path)
        return instr, path

    def hands_on(self, index: int) -> bool:
        """Returns whether this loop body passes an element of its tuple through unchanged."""
        instr, path = self.resolve(self.root.name, (index,))
        while instr.opcode == "copy":
            instr, path = self.resolve(instr.operands[0], path)
        return instr.opcode == "parameter" and path == (index,)


class Module:
    def __init__(self, text: str):
        lines = text.splitlines()
        if not lines or not lines[0].startswith("HloModule "):
            raise ValueError("not the text of an HLO module: it does not start with HloModule")
        self.header = lines[0]
        # On a TPU, whose layouts have tiles, a memory space is memory on the chip (or the host's, 5).
        # On a GPU only the host's is elsewhere: 1 is HBM that NCCL knows.
        self.is_tpu = ":T(" in text
        self.computations: dict[str, Computation] = {}
        self.inlined: dict[str, dict[str, Instr]] = {}
        entry = current = None
        for line in lines:
            if current is None:
                if header := _HEADER.match(line):
                    current = self.computations[header.group(2)] = Computation(header.group(2), {})
                    entry = current if header.group(1) else entry
                elif not _BETWEEN.match(line):
                    raise ValueError(f"cannot read this line of HLO: {line:.120}")
            elif line.startswith("}"):
                current = None
            else:
                instr = self._instruction(line)
                current.instrs[instr.name] = instr
        if entry is None:
            raise ValueError("the HLO module has no ENTRY computation")
        self.entry = entry

    def _instruction(self, line: str) -> Instr:
        found = _INSTRUCTION.match(_COMMENT.sub("", line))
        if not found:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        rest = found.group(3)
        kind, at = self._type(rest, 0)
        opcode = _OPCODE.match(rest, at)
        if not opcode:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        end = _closing(rest, opcode.end())
        literal, name = rest[opcode.end() : end], opcode.group(1)
        if name == "fusion-start" and not isinstance(kind, Shape):  # ((operands), result): a fusion that something
            name, kind = "fusion", kind[1]  # else runs beside; its done only hands the result on
        elif name == "fusion-done":
            name = "bitcast"
        return Instr(
            name=found.group(2),
            type=kind,
            opcode=name,
            operands=tuple(re.findall(r"%([^\s,()]+)", literal)) if name != "constant" else (),
            literal=literal,
            attributes=rest[end + 1 :],
            is_root=bool(found.group(1)),
        )

    def _type(self, text: str, at: int) -> tuple[Type, int]:
        """The type that starts at `at`, and where it ends."""
        if text[at] == "(":
            items, at = [], at + 1
            while text[at] != ")":
                if text[at] in ", ":
                    at += 1
                    continue
                item, at = self._type(text, at)
                items.append(item)
            return tuple(items), at + 1
        found = _ARRAY.match(text, at)
        if not found:
            raise ValueError(f"cannot read this type of HLO: {text[at : at + 80]}")
        dtype, dims, layout = found.group(1), found.group(2), found.group(3) or ""
        bits = _BITS.get(dtype)
        if bits is None:
            if not _NARROW.fullmatch(dtype):
                raise ValueError(f"the HLO has an element type that is not known here: {dtype}")
            packed = re.search(r"E\((\d+)\)", layout)
            bits = int(packed.group(1)) if packed else 8
        space = re.search(r"S\((\d+)\)", layout)
        in_hbm = space is None or space.group(1) == "0" or (not self.is_tpu and space.group(1) != "5")
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        return Shape(dtype, sizes, bits, in_hbm), found.end()

    @functools.cached_property
    def devices(self) -> int:
        counts = [re.search(rf"{key}=(\d+)", self.header) for key in ("num_partitions", "replica_count")]
        return math.prod(int(found.group(1)) for found in counts if found)

    @functools.cached_property
    def donated(self) -> set[int]:
        """The numbers of the parameters whose buffers the results may take."""
        found = re.search(r"input_output_alias=\{(.*?)\}, \w+=", self.header + ", end=")
        return {int(n) for n in re.findall(r": \((\d+),", found.group(1))} if found else set()

    def body(self, instr: Instr) -> dict[str, Instr]:
        """Instructions of a fusion with nested fusions inlined; the last is the root."""
        name = called(instr, "calls")
        if name not in self.inlined:
            result: dict[str, Instr] = {}
            self._inline(name, "", None, result)
            self.inlined[name] = result
        return self.inlined[name]

    def _inline(self, name: str, prefix: str, given: tuple[str, ...] | None, result: dict[str, Instr]) -> None:
        last = None
        for instr in self.computations[name].instrs.values():
            new = dataclasses.replace(
                instr, name=prefix + instr.name, operands=tuple(prefix + o for o in instr.operands), is_root=False
            )
            if instr.opcode == "fusion":
                self._inline(called(instr, "calls"), f"{new.name}/", new.operands, result)
                root = self.computations[called(instr, "calls")].root
                new = dataclasses.replace(new, opcode="bitcast", operands=(f"{new.name}/{root.name}",))
            elif instr.opcode == "parameter" and given is not None:
                new = dataclasses.replace(new, opcode="bitcast", operands=(given[int(instr.literal)],))
            result[new.name] = new
            last = new if instr.is_root else last
        if given is None and last is not None:  # the root last: a computation's need not be
            result["/root"] = dataclasses.replace(last, name="/root", opcode="bitcast", operands=(last.name,))


def _closing(text: str, at: int) -> int:
    """Finds the bracket that closes the one opened before `at`."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, at):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"cannot read this HLO, a bracket stays open: {text:.120}")


def leaves(kind: Type) -> list[Shape]:
    if isinstance(kind, Shape):
        return [kind]
    return [leaf for item in kind for leaf in leaves(item)]


def _index(instr: Instr) -> int:
    return int(instr.attribute(r"index=(\d+)") or 0)


def called(instr: Instr, key: str) -> str:
    name = instr.attribute(rf"\b{key}=%?([^\s,]+)")
    if name is None:
        raise ValueError(f"this HLO {instr.opcode} has no {key}: %{instr.name}")
    return name
