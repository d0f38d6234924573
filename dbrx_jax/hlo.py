"""What an optimised program does, read off the text of its HLO (``compiled.as_text()``) of a TPU or a GPU.

The collectives that it runs, the bytes that it moves between HBM and the chip, and its largest temporaries.
Bytes are those of the elements, without the padding of a TPU's tiles. XLA's own count, ``cost_analysis()``,
has loops once and moves between memories several times.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


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
    # moved, sliced, cast or reshaped. One that a loop changes is not, nor one that is looked up by a gather.
    parameters: tuple[str, ...]


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


def collectives(text: str, trips: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of a module, in the order of its computations.

    Args:
      text: of the module.
      trips: see :func:`hbm_traffic`.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    return [found for running in _running(_Module(text), trips or {}) for found in _collectives(*running)]


def bytes_moved(collective: Collective) -> float:
    """Bytes that each device sends in one run, around a ring."""
    n, kind = collective.group_size, collective.kind
    full = collective.result_bytes if kind == "all-gather" else collective.operand_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return full
    return full * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def hbm_traffic(text: str, trips: Mapping[str, int] | None = None) -> Traffic:
    """The HBM traffic of one execution of a module.

    Every executed instruction reads its operands and writes its results once, where those are in HBM. Of what
    is only sliced or gathered from, the slice counts; of an update in place, the update. Of a conditional the
    largest branch counts. A custom call (a kernel) reads all of its operands, or less if it carries a cost
    estimate that says so, and writes all of its results. A collective reads its operand and writes its
    result once.

    Args:
      text: of the module.
      trips: regular expression -> iterations, for loops whose number the program does not know; the first that
        is found in the loop's op_name (such as "jit(decode)/while") counts. Loops that count from a constant
        to a constant need none; any other runs once.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    module = _Module(text)
    counted = _traffic(_Scope(module, module.entry), trips or {})
    by_op = {key: read + written for key, (read, written) in counted.items()}
    return Traffic(
        read=sum(read for read, _ in counted.values()),
        written=sum(written for _, written in counted.values()),
        by_op=dict(sorted(by_op.items(), key=lambda item: -item[1])),
    )


def largest_temporaries(text: str, n: int = 10) -> list[Temporary]:
    """The `n` largest results in HBM of instructions that are no parameters, views or updates in place.

    Outputs of the program are among them. A loop's body counts once: its buffers are used again.

    Raises:
      ValueError: the text has a construct that is not known here; the message names it.
    """
    found = []
    for scope, instr, _ in _running(_Module(text), {}):
        if instr.opcode not in _CONTROL:
            leaves = _leaves(_result_type(instr))
            for shape, written in zip(leaves, _cost(scope, instr).results, strict=True):
                if written == shape.bytes > 0:
                    found.append(Temporary(shape.bytes, str(shape), instr.opcode, instr.op_name))
    return sorted(found, key=lambda temporary: -temporary.bytes)[:n]


# ---- the text ----

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
class _Shape:
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


_Type: TypeAlias = "_Shape | tuple[_Type, ...]"


@dataclass(frozen=True, eq=False)
class _Instr:
    name: str
    type: _Type
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the brackets
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
class _Computation:
    name: str
    instrs: dict[str, _Instr]  # in the order of execution

    @functools.cached_property
    def root(self) -> _Instr:
        return next(instr for instr in self.instrs.values() if instr.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[_Instr]]:
        found: dict[str, list[_Instr]] = defaultdict(list)
        for instr in self.instrs.values():
            for name in instr.operands:
                found[name].append(instr)
        return found

    @functools.cached_property
    def last_use(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """The position of the last instruction that reads each value, views of it included."""
        found: dict[tuple[str, tuple[int, ...]], int] = {}
        for position, instr in enumerate(self.instrs.values()):
            if instr.opcode not in _VIEWS or instr.is_root:
                pending = [self.resolve(name) for name in instr.operands]
                while pending:
                    base, path = pending.pop()
                    if base.opcode == "tuple":
                        pending += [self.resolve(name) for name in base.operands]
                    found[base.name, path] = position
        return found

    def resolve(self, name: str, path: tuple[int, ...] = ()) -> tuple[_Instr, tuple[int, ...]]:
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
        """Whether this body of a loop leaves an element of its tuple as it is."""
        instr, path = self.resolve(self.root.name, (index,))
        while instr.opcode == "copy":
            instr, path = self.resolve(instr.operands[0], path)
        return instr.opcode == "parameter" and path == (index,)


class _Module:
    def __init__(self, text: str):
        lines = text.splitlines()
        if not lines or not lines[0].startswith("HloModule "):
            raise ValueError("not the text of an HLO module: it does not start with HloModule")
        self.header = lines[0]
        # On a TPU, whose layouts have tiles, a memory space is memory on the chip (or the host's, 5).
        # On a GPU only the host's is elsewhere: 1 is HBM that NCCL knows.
        self.is_tpu = ":T(" in text
        self.computations: dict[str, _Computation] = {}
        self.inlined: dict[str, dict[str, _Instr]] = {}
        entry = current = None
        for line in lines:
            if current is None:
                if header := _HEADER.match(line):
                    current = self.computations[header.group(2)] = _Computation(header.group(2), {})
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

    def _instruction(self, line: str) -> _Instr:
        found = _INSTRUCTION.match(_COMMENT.sub("", line))
        if not found:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        rest = found.group(3)
        kind, at = self._type(rest, 0)
        opcode = _OPCODE.match(rest, at)
        if not opcode:
            raise ValueError(f"cannot read this line of HLO: {line:.120}")
        end = _closing(rest, opcode.end())
        literal = rest[opcode.end() : end]
        return _Instr(
            name=found.group(2),
            type=kind,
            opcode=opcode.group(1),
            operands=tuple(re.findall(r"%([^\s,()]+)", literal)) if opcode.group(1) != "constant" else (),
            literal=literal,
            attributes=rest[end + 1 :],
            is_root=bool(found.group(1)),
        )

    def _type(self, text: str, at: int) -> tuple[_Type, int]:
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
        return _Shape(dtype, sizes, bits, in_hbm), found.end()

    @functools.cached_property
    def devices(self) -> int:
        counts = [re.search(rf"{key}=(\d+)", self.header) for key in ("num_partitions", "replica_count")]
        return math.prod(int(found.group(1)) for found in counts if found)

    @functools.cached_property
    def donated(self) -> set[int]:
        """The numbers of the parameters whose buffers the results may take."""
        found = re.search(r"input_output_alias=\{(.*?)\}, \w+=", self.header + ", end=")
        return {int(n) for n in re.findall(r": \((\d+),", found.group(1))} if found else set()

    def body(self, instr: _Instr) -> dict[str, _Instr]:
        """What a fusion computes, with the fusions inside it put in place; the last is the root."""
        name = _called(instr, "calls")
        if name not in self.inlined:
            result: dict[str, _Instr] = {}
            self._inline(name, "", None, result)
            self.inlined[name] = result
        return self.inlined[name]

    def _inline(self, name: str, prefix: str, given: tuple[str, ...] | None, result: dict[str, _Instr]) -> None:
        last = None
        for instr in self.computations[name].instrs.values():
            new = dataclasses.replace(
                instr, name=prefix + instr.name, operands=tuple(prefix + o for o in instr.operands), is_root=False
            )
            if instr.opcode == "fusion":
                self._inline(_called(instr, "calls"), f"{new.name}/", new.operands, result)
                root = self.computations[_called(instr, "calls")].root
                new = dataclasses.replace(new, opcode="bitcast", operands=(f"{new.name}/{root.name}",))
            elif instr.opcode == "parameter" and given is not None:
                new = dataclasses.replace(new, opcode="bitcast", operands=(given[int(instr.literal)],))
            result[new.name] = new
            last = new if instr.is_root else last
        if given is None and last is not None:  # the root last: a computation's need not be
            result["/root"] = dataclasses.replace(last, name="/root", opcode="bitcast", operands=(last.name,))


def _closing(text: str, at: int) -> int:
    """Where the bracket that was opened before `at` is closed."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, at):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"cannot read this HLO, a bracket stays open: {text:.120}")


def _leaves(kind: _Type) -> list[_Shape]:
    if isinstance(kind, _Shape):
        return [kind]
    return [leaf for item in kind for leaf in _leaves(item)]


def _index(instr: _Instr) -> int:
    return int(instr.attribute(r"index=(\d+)") or 0)


def _called(instr: _Instr, key: str) -> str:
    name = instr.attribute(rf"\b{key}=%?([^\s,]+)")
    if name is None:
        raise ValueError(f"this HLO {instr.opcode} has no {key}: %{instr.name}")
    return name


# ---- what runs, and how often ----


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _words("bitcast get-tuple-element tuple")
_CONTROL = _words("while conditional call call-start async-start")
_FREE = _VIEWS | _words(
    "parameter constant after-all partition-id replica-id add-dependency opt-barrier domain async-update"
)
_MOVES = _words("copy copy-start convert reshape transpose slice slice-start dynamic-slice")
_COLLECTIVES = _words(
    """all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute
    collective-broadcast"""
)


@dataclass(eq=False)
class _Scope:
    """A computation where it is called."""

    module: _Module
    computation: _Computation
    outer: "_Scope | None" = None
    caller: _Instr | None = None
    branch: int = 0  # of a conditional

    @functools.cached_property
    def started(self) -> dict[str, set[str]]:
        """Fusions that start a collective, or carry one on while they compute -> the channels of those."""
        found: dict[str, set[str]] = {}
        for instr in self.computation.instrs.values():
            if instr.opcode != "fusion":
                continue
            body = self.module.body(instr)
            channels = {_channel(op) for op in body.values() if op.opcode in _COLLECTIVES}
            starts = any(op.target == "AsyncCollectiveStart" for op in body.values())
            if channels and (starts or channels & self.carried(instr, found)):
                found[instr.name] = channels
        return found

    def carried(self, instr: _Instr, started: dict[str, set[str]]) -> set[str]:
        """The channels of the collectives under way that are handed to a fusion."""
        bases = {self.computation.resolve(name)[0].name for name in instr.operands}
        return {channel for name in bases for channel in started.get(name, ())}

    def source(self, name: str, path: tuple[int, ...] = ()) -> tuple["_Scope", _Instr, tuple[int, ...]]:
        """Where a value comes from: through views, moves, and unchanged through loops and calls."""
        instr, path = self.computation.resolve(name, path)
        opcode = instr.opcode
        if opcode.endswith("-done") and instr.operands:
            start = self.computation.resolve(instr.operands[0])[0]
            if start.opcode in _MOVES:
                return self.source(start.operands[0], ())
        elif opcode in _MOVES or instr.target == "ConcatBitcast":  # joins the slices of one array
            return self.source(instr.operands[0], ())
        elif opcode in ("opt-barrier", "add-dependency"):
            return self.source(instr.operands[0], path)
        elif opcode == "fusion":
            return self._through_fusion(instr, path)
        elif opcode == "while" and path:
            if self.module.computations[_called(instr, "body")].hands_on(path[0]):
                return self.source(instr.operands[0], path)
        elif opcode == "parameter" and self.outer is not None and self.caller is not None:
            return self._through_parameter(instr, path)
        return self, instr, path

    def _through_fusion(self, instr: _Instr, path: tuple[int, ...]) -> tuple["_Scope", _Instr, tuple[int, ...]]:
        body = _Computation("", self.module.body(instr))
        found, inner = body.resolve("/root", path)
        while found.opcode in _MOVES:
            found, inner = body.resolve(found.operands[0], inner)
        if found.opcode == "parameter":
            return self.source(instr.operands[int(found.literal)], inner)
        return self, instr, path

    def _through_parameter(self, instr: _Instr, path: tuple[int, ...]) -> tuple["_Scope", _Instr, tuple[int, ...]]:
        assert self.outer is not None
        assert self.caller is not None
        if self.caller.opcode != "while":
            number = self.branch + 1 if self.caller.opcode == "conditional" else int(instr.literal)
            return self.outer.source(self.caller.operands[number], path)
        if path and self.module.computations[_called(self.caller, "body")].hands_on(path[0]):
            return self.outer.source(self.caller.operands[0], path)
        return self, instr, path

    def constant(self, name: str, path: tuple[int, ...] = ()) -> int | None:
        """The value of a constant whole number."""
        _, instr, _ = self.source(name, path)
        return int(instr.literal) if instr.opcode == "constant" and re.fullmatch(r"-?\d+", instr.literal) else None


def _called_scopes(scope: _Scope, instr: _Instr, trips: Mapping[str, int]) -> list[tuple[_Scope, int]]:
    """The computations that an instruction runs, and how often."""

    def inner(name: str, branch: int = 0) -> _Scope:
        return _Scope(scope.module, scope.module.computations[name], scope, instr, branch)

    if instr.opcode == "while":
        condition, body = inner(_called(instr, "condition")), inner(_called(instr, "body"))
        n = _trips(scope, instr, condition, body, trips)
        return [(condition, n), (body, n)]
    if instr.opcode == "conditional":
        names = instr.attribute(r"branch_computations=\{([^}]*)\}")
        listed = (
            re.findall(r"%?([^\s,]+)", names)
            if names
            else [_called(instr, f"{b}_computation") for b in ("true", "false")]
        )
        return [(inner(name, branch), 1) for branch, name in enumerate(listed)]
    if instr.opcode in _CONTROL:
        key = "calls" if re.search(r"\bcalls=", instr.attributes) else "to_apply"
        return [(inner(_called(instr, key)), 1)]
    return []


def _trips(scope: _Scope, instr: _Instr, condition: _Scope, body: _Scope, trips: Mapping[str, int]) -> int:
    if known := instr.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    for pattern, n in trips.items():
        if re.search(pattern, instr.op_name):
            return n
    return _counted_trips(scope, instr, condition, body) or 1


def _counted_trips(scope: _Scope, instr: _Instr, condition: _Scope, body: _Scope) -> int | None:
    """Iterations of a loop that counts up from a constant to a constant; a TPU's text does not give them."""
    test = condition.computation.resolve(condition.computation.root.name)[0]
    if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, path = condition.computation.resolve(test.operands[0])
    if counter.opcode != "parameter" or len(path) != 1:
        return None
    step, where = body.computation.resolve(body.computation.root.name, path)
    if step.opcode != "add" or where:
        return None
    _, before, came = body.source(step.operands[0])
    start, end = scope.constant(instr.operands[0], path), condition.constant(test.operands[1])
    if before.opcode != "parameter" or came != path or start is None or end is None:
        return None
    by = body.constant(step.operands[1])
    return max(0, -(-(end - start) // by)) if by and by > 0 else None


def _running(module: _Module, trips: Mapping[str, int]) -> Iterator[tuple[_Scope, _Instr, int]]:
    """Every instruction that runs, and how often; all branches of conditionals."""

    def walk(scope: _Scope, runs: int) -> Iterator[tuple[_Scope, _Instr, int]]:
        for instr in scope.computation.instrs.values():
            yield scope, instr, runs
            for inner, times in _called_scopes(scope, instr, trips):
                yield from walk(inner, runs * times)

    return walk(_Scope(module, module.entry), 1)


def _traffic(scope: _Scope, trips: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Opcode and op_name -> bytes read, bytes written."""
    result: dict[str, tuple[int, int]] = {}

    def add(more: Mapping[str, tuple[int, int]], times: int) -> None:
        for key, (read, written) in more.items():
            before = result.get(key, (0, 0))
            result[key] = (before[0] + times * read, before[1] + times * written)

    for instr in scope.computation.instrs.values():
        inner = [(_traffic(called, trips), times) for called, times in _called_scopes(scope, instr, trips)]
        if instr.opcode == "conditional":
            inner = [max(inner, key=lambda branch: sum(map(sum, branch[0].values())))]
        for called, times in inner:
            add(called, times)
        if instr.opcode not in _CONTROL:
            cost = _cost(scope, instr)
            if any(cost.operands) or any(cost.results):
                key = f"{instr.opcode} {instr.op_name}".strip()
                add({key: (sum(cost.operands), sum(cost.results))}, 1)
    return result


# ---- one instruction ----

# An element of the result needs at most one of each operand.
_ELEMENTWISE = _words(
    """abs acos acosh add and asin asinh atan2 atanh bitcast broadcast cbrt ceil clamp compare complex concatenate
    convert copy cos cosh cosine count-leading-zeros divide erf exponential exponential-minus-one floor
    get-tuple-element imag is-finite log log-plus-one logistic maximum minimum multiply negate not or pad popcnt
    power real reduce-precision remainder reshape reverse round-nearest-afz round-nearest-even rsqrt select
    shift-left shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-convert subtract tan tanh
    transpose xor"""
)
# It may need every element of the operands.
_WHOLE = _COLLECTIVES | _words(
    """cholesky convolution custom-call dot fft iota map ragged-dot reduce-window rng rng-bit-generator
    rng-get-and-update-state scaled-dot select-and-scatter sort topk triangular-solve tuple"""
)
_PART = _words("reduce bitcast-convert")  # its share of them
_PICKS = _words("slice dynamic-slice gather")
_UPDATES = _words("dynamic-update-slice scatter")
_KNOWN = _ELEMENTWISE | _WHOLE | _PART | _PICKS | _UPDATES
_NOTHING = _words("ConcatBitcast AllocateBuffer PrepareAsyncCallStart PrepareAsyncCallDone")


@dataclass(frozen=True)
class _Cost:
    operands: list[int]  # bytes read from HBM
    results: list[int]  # bytes written to HBM, of each leaf of the result


def _cost(scope: _Scope, instr: _Instr) -> _Cost:
    leaves = _leaves(_result_type(instr))
    nothing = _Cost([], [0] * len(leaves))
    if instr.opcode in _FREE or instr.opcode.endswith("-done") or instr.target in _NOTHING:
        return nothing
    if instr.opcode == "copy-start" and not _is_used(scope.computation, instr):
        return nothing  # brings a parameter to the chip for the next execution; this one's was counted at its start
    body = scope.module.body(instr) if instr.opcode == "fusion" else _alone(scope, instr)
    dead = functools.partial(_dies_at, scope, instr)
    carried = _under_way(scope, instr, body)
    sizes = [scope.computation.instrs[name].type for name in instr.operands]
    needed, results = _needs(instr, body, dead, carried)
    read: dict[str, int] = defaultdict(int)
    for number, (name, kind) in enumerate(zip(instr.operands, sizes, strict=True)):
        if isinstance(kind, _Shape) and kind.in_hbm:
            read[name] = min(kind.bytes, read[name] + -(-int(needed.get(number, 0)) * kind.bits // 8))
        elif not isinstance(kind, _Shape) and needed.get(number):
            read[name] = sum(leaf.bytes for leaf in _leaves(kind) if leaf.in_hbm)
    written = [w if leaf.in_hbm else 0 for w, leaf in zip(results, leaves, strict=True)]
    if instr.opcode == "custom-call":
        return _kernel_cost(instr, list(read.values()), written)
    return _Cost(list(read.values()), written)


def _is_used(computation: _Computation, start: _Instr) -> bool:
    dones = computation.users.get(start.name, [])
    return any(done.is_root or computation.users.get(done.name) for done in dones)


def _kernel_cost(instr: _Instr, read: list[int], written: list[int]) -> _Cost:
    if instr.target.startswith(("__cublas", "__cudnn")) and len(written) > 1:
        written = [*written[:-1], 0]  # their workspace
    estimate = int(instr.attribute(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"') or 0)
    if 0 < estimate < sum(read) + sum(written):
        return _Cost([max(0, estimate - sum(written))], written)
    return _Cost(read, written)


def _result_type(instr: _Instr) -> _Type:
    """Of an asynchronous start, what its done will give."""
    opcode, kind = instr.opcode, instr.type
    if not opcode.endswith("-start") or isinstance(kind, _Shape) or opcode in _CONTROL:
        return kind
    if opcode == "copy-start":
        return kind[0]  # (result, operand, context)
    if opcode == "all-reduce-start":
        return kind
    return kind[1]  # (operands, results, contexts)


def _alone(scope: _Scope, instr: _Instr) -> dict[str, _Instr]:
    """A plain instruction as the body of a fusion."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode not in _KNOWN:
        raise ValueError(f"the HLO has an instruction that is not known here: {instr.opcode} (%{instr.name})")
    body = {}
    for number, name in enumerate(instr.operands):
        kind = scope.computation.instrs[name].type
        body[f"/{number}"] = _Instr(f"/{number}", kind, "parameter", (), str(number), "", False)
    operands = tuple(f"/{number}" for number in range(len(instr.operands)))
    body["/root"] = dataclasses.replace(
        instr, name="/root", type=_result_type(instr), opcode=opcode, operands=operands, is_root=False
    )
    return body


def _under_way(scope: _Scope, instr: _Instr, body: dict[str, _Instr]) -> set[str]:
    """The collectives in a fusion that an earlier one started (a TPU computes while they run): counted there."""
    if instr.opcode != "fusion" or not any(op.opcode in _COLLECTIVES for op in body.values()):
        return set()
    channels = scope.carried(instr, scope.started)
    starting = {name for op in body.values() if op.target == "AsyncCollectiveStart" for name in op.operands}
    return {
        op.name
        for op in body.values()
        if op.opcode in _COLLECTIVES and op.name not in starting and _channel(op) in channels
    }


def _channel(instr: _Instr) -> str:
    return f"{instr.opcode} {instr.attribute(r'channel_id=([0-9]+)')}"


def _dies_at(scope: _Scope, instr: _Instr, number: int) -> bool:
    """Whether nothing reads an operand's buffer afterwards, so that its result may be written over it."""
    base, path = scope.computation.resolve(instr.operands[number])
    if base.opcode == "parameter" and scope.outer is None and int(base.literal) not in scope.module.donated:
        return False
    if base.opcode == "constant":
        return False
    position = list(scope.computation.instrs).index(instr.name)
    last = scope.computation.last_use
    return all(last.get((base.name, path[:end]), -1) <= position for end in range(len(path) + 1))


def _needs(
    fusion: _Instr, body: dict[str, _Instr], dies: Callable[[int], bool], carried: set[str]
) -> tuple[dict[int, float], list[int]]:
    """How many elements of each parameter a fusion's body reads, and the bytes that each result takes."""
    computation = _Computation("", body)
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
            results.append(_leaves(body[updates[inner[0] if inner else 0]].type)[0].bytes)
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


def _operand_needs(instr: _Instr, body: dict[str, _Instr], wanted: float) -> Sequence[tuple[str, float]]:
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


def _in_place(computation: _Computation, update: _Instr, dies: Callable[[int], bool]) -> bool:
    base, _ = computation.resolve(update.operands[0])
    return base.opcode == "parameter" and dies(int(base.literal))


def _result_leaves(computation: _Computation, name: str, path: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a result: of a tuple each of its operands."""
    made, path = computation.resolve(name, path)
    if made.opcode == "tuple":
        return [leaf for operand in made.operands for leaf in _result_leaves(computation, operand, ())]
    kind = _at(made.type, path)
    if isinstance(kind, _Shape):
        return [(made.name, path)]
    return [leaf for i in range(len(kind)) for leaf in _result_leaves(computation, made.name, (*path, i))]


def _aliasing(instr: _Instr) -> str:
    return instr.attribute(r"output_to_operand_aliasing=(\{.*?\)\})") or ""


def _at(kind: _Type, path: tuple[int, ...]) -> Any:
    for index in path:
        kind = kind[index]  # type: ignore[index]
    return kind


def _size(instr: _Instr) -> int:
    """Elements; of a tuple, of its first array."""
    leaves = _leaves(instr.type)
    return leaves[0].size if leaves else 0


# ---- collectives ----


def _collectives(scope: _Scope, instr: _Instr, runs: int) -> Iterator[Collective]:
    """Those of one instruction; a TPU puts some into fusions."""
    opcode = instr.opcode.removesuffix("-start")
    if opcode in _COLLECTIVES:
        yield _collective(scope, instr, opcode, _leaves(_result_type(instr)), instr.op_name, runs)
    elif instr.opcode == "fusion":
        body = scope.module.body(instr)
        under_way = _under_way(scope, instr, body)
        inner = _Scope(scope.module, _Computation("", body), scope, instr)
        for op in body.values():
            if op.opcode in _COLLECTIVES and op.name not in under_way:
                users = [user for user in body.values() if op.name in user.operands]
                kind, results = op.opcode, users if op.opcode == "all-reduce" else []
                if results and all(user.opcode == "dynamic-slice" for user in results):
                    kind = "reduce-scatter"  # a TPU's all-reduce-scatter: each device keeps its slice
                else:
                    results = [op]
                leaves = [leaf for result in results for leaf in _leaves(result.type)]
                yield _collective(inner, op, kind, leaves, op.op_name or instr.op_name, runs)


def _collective(scope: _Scope, instr: _Instr, kind: str, results: list[_Shape], op_name: str, runs: int) -> Collective:
    operands = [leaf for name in instr.operands for leaf in _leaves(scope.computation.instrs[name].type)]
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


def _group_size(module: _Module, instr: _Instr) -> int:
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
    return max((group.count(",") + 1 for group in re.findall(r"\{([^}]+)\}", groups)), default=module.devices)
