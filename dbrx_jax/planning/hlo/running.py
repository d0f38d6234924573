"""Call scopes of a program: which computations run how often, and the sources of their values."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dbrx_jax.planning.hlo.text import VIEWS, Computation, Instr, Module, called, words

CONTROL = words("while conditional call call-start async-start")
FREE = VIEWS | words(
    "parameter constant after-all partition-id replica-id add-dependency opt-barrier domain async-update call-update"
)
_MOVES = words("copy copy-start convert reshape transpose slice slice-start dynamic-slice")
COLLECTIVES = words(
    """all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute
    collective-broadcast"""
)


@dataclass(eq=False)
class Scope:
    """A computation where it is called."""

    module: Module
    computation: Computation
    outer: "Scope | None" = None
    caller: Instr | None = None
    branch: int = 0  # of a conditional

    @functools.cached_property
    def started(self) -> dict[str, set[str]]:
        """Fusions that start a collective, or carry one on while they compute -> the channels of those."""
        found: dict[str, set[str]] = {}
        for instr in self.computation.instrs.values():
            if instr.opcode != "fusion":
                continue
            body = self.module.body(instr)
            channels = {channel(op) for op in body.values() if op.opcode in COLLECTIVES}
            starts = any(op.target == "AsyncCollectiveStart" for op in body.values())
            if channels and (starts or channels & self.carried(instr, found)):
                found[instr.name] = channels
        return found

    def carried(self, instr: Instr, started: dict[str, set[str]]) -> set[str]:
        """The channels of the collectives under way that are handed to a fusion."""
        bases = {self.computation.resolve(name)[0].name for name in instr.operands}
        return {found for name in bases for found in started.get(name, ())}

    def source(self, name: str, path: tuple[int, ...] = ()) -> tuple["Scope", Instr, tuple[int, ...]]:
        """Traces a value to its source through views, moves, loops and calls."""
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
            if self.module.computations[called(instr, "body")].hands_on(path[0]):
                return self.source(instr.operands[0], path)
        elif opcode == "parameter" and self.outer is not None and self.caller is not None:
            return self._through_parameter(instr, path)
        return self, instr, path

    def _through_fusion(self, instr: Instr, path: tuple[int, ...]) -> tuple["Scope", Instr, tuple[int, ...]]:
        body = Computation("", self.module.body(instr))
        found, inner = body.resolve("/root", path)
        while found.opcode in _MOVES:
            found, inner = body.resolve(found.operands[0], inner)
        if found.opcode == "parameter":
            return self.source(instr.operands[int(found.literal)], inner)
        return self, instr, path

    def _through_parameter(self, instr: Instr, path: tuple[int, ...]) -> tuple["Scope", Instr, tuple[int, ...]]:
        assert self.outer is not None
        assert self.caller is not None
        if self.caller.opcode != "while":
            number = self.branch + 1 if self.caller.opcode == "conditional" else int(instr.literal)
            return self.outer.source(self.caller.operands[number], path)
        if path and self.module.computations[called(self.caller, "body")].hands_on(path[0]):
            return self.outer.source(self.caller.operands[0], path)
        return self, instr, path

    def constant(self, name: str, path: tuple[int, ...] = ()) -> int | None:
        """The value of a constant whole number."""
        _, instr, _ = self.source(name, path)
        return int(instr.literal) if instr.opcode == "constant" and re.fullmatch(r"-?\d+", instr.literal) else None


def called_scopes(scope: Scope, instr: Instr, trips: Mapping[str, int]) -> list[tuple[Scope, int]]:
    """The computations that an instruction runs, and how often."""

    def inner(name: str, branch: int = 0) -> Scope:
        return Scope(scope.module, scope.module.computations[name], scope, instr, branch)

    if instr.opcode == "while":
        condition, body = inner(called(instr, "condition")), inner(called(instr, "body"))
        n = _trips(scope, instr, condition, body, trips)
        return [(condition, n), (body, n)]
    if instr.opcode == "conditional":
        names = instr.attribute(r"branch_computations=\{([^}]*)\}")
        listed = (
            re.findall(r"%?([^\s,]+)", names)
            if names
            else [called(instr, f"{b}_computation") for b in ("true", "false")]
        )
        return [(inner(name, branch), 1) for branch, name in enumerate(listed)]
    if instr.opcode in CONTROL:
        key = "calls" if re.search(r"\bcalls=", instr.attributes) else "to_apply"
        return [(inner(called(instr, key)), 1)]
    return []


def _trips(scope: Scope, instr: Instr, condition: Scope, body: Scope, trips: Mapping[str, int]) -> int:
    if known := instr.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    for pattern, n in trips.items():
        if re.search(pattern, instr.op_name):
            return n
    return _counted_trips(scope, instr, condition, body) or 1


def _counted_trips(scope: Scope, instr: Instr, condition: Scope, body: Scope) -> int | None:
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


def running(module: Module, trips: Mapping[str, int]) -> Iterator[tuple[Scope, Instr, int]]:
    """Every instruction that runs, and how often; all branches of conditionals."""

    def walk(scope: Scope, runs: int) -> Iterator[tuple[Scope, Instr, int]]:
        for instr in scope.computation.instrs.values():
            yield scope, instr, runs
            for inner, times in called_scopes(scope, instr, trips):
                yield from walk(inner, runs * times)

    return walk(Scope(module, module.entry), 1)


def channel(instr: Instr) -> str:
    return f"{instr.opcode} {instr.attribute(r'channel_id=([0-9]+)')}"
