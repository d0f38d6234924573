"""Call scopes of a program: the computations that run, how often, and the sources of their values."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dbrx_jax.planning.hlo.text import VIEWS, Computation, Instruction, Module, TuplePath, name_set

CONTROL = name_set("while conditional call call-start async-start")
FREE = VIEWS | name_set(
    "parameter constant after-all partition-id replica-id add-dependency opt-barrier domain async-update call-update"
)
COLLECTIVES = name_set(
    "all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast"
)
_MOVES = name_set("copy copy-start convert reshape transpose slice slice-start dynamic-slice")


@dataclass(eq=False)
class Scope:
    """A computation together with the instruction that calls it."""

    module: Module
    computation: Computation
    outer: "Scope | None" = None
    caller: Instruction | None = None
    branch: int = 0  # of a conditional

    @functools.cached_property
    def async_channels(self) -> dict[str, set[str]]:
        """Channels of the collectives that each fusion starts, or continues while it computes, by fusion."""
        async_channels: dict[str, set[str]] = {}
        for instr in self.computation.instructions.values():
            if instr.opcode == "fusion":
                body = self.module.fusion_body(instr)
                channels = {channel(op) for op in body.values() if op.opcode in COLLECTIVES}
                starts = any(op.target == "AsyncCollectiveStart" for op in body.values())
                if channels and (starts or channels & self.incoming_channels(instr, async_channels)):
                    async_channels[instr.name] = channels
        return async_channels

    def incoming_channels(self, fusion: Instruction, async_channels: Mapping[str, set[str]]) -> set[str]:
        """Returns the channels of the running collectives that a fusion has as operands."""
        producers = {self.computation.resolve(name)[0].name for name in fusion.operands}
        return {channel for name in producers for channel in async_channels.get(name, ())}

    def source(self, name: str, path: TuplePath = ()) -> tuple["Scope", Instruction, TuplePath]:
        """Traces a value to its source through views, moves, loops and calls."""
        instr, path = self.computation.resolve(name, path)
        opcode = instr.opcode
        if opcode.endswith("-done") and instr.operands:
            start = self.computation.resolve(instr.operands[0])[0]
            if start.opcode in _MOVES:
                return self.source(start.operands[0])
        elif opcode in _MOVES or instr.target == "ConcatBitcast":  # joins the slices of one array
            return self.source(instr.operands[0])
        elif opcode in ("opt-barrier", "add-dependency"):
            return self.source(instr.operands[0], path)
        elif opcode == "fusion":
            body = Computation("", self.module.fusion_body(instr))
            producer, producer_path = body.resolve("/root", path)
            while producer.opcode in _MOVES:
                producer, producer_path = body.resolve(producer.operands[0], producer_path)
            if producer.opcode == "parameter":
                return self.source(instr.operands[int(producer.literal)], producer_path)
        elif opcode == "while" and path:
            if self.module.called(instr, "body").is_invariant(path[0]):
                return self.source(instr.operands[0], path)
        elif opcode == "parameter" and self.outer is not None and self.caller is not None:
            if self.caller.opcode != "while":
                index = self.branch + 1 if self.caller.opcode == "conditional" else int(instr.literal)
                return self.outer.source(self.caller.operands[index], path)
            if path and self.module.called(self.caller, "body").is_invariant(path[0]):
                return self.outer.source(self.caller.operands[0], path)
        return self, instr, path

    def constant(self, name: str, path: TuplePath = ()) -> int | None:
        """Returns the value of an integer constant, None for other values."""
        _, instr, _ = self.source(name, path)
        return int(instr.literal) if instr.opcode == "constant" and re.fullmatch(r"-?\d+", instr.literal) else None


def entry_scope(text: str) -> Scope:
    """Parses a module and returns the scope of its entry computation."""
    module = Module(text)
    return Scope(module, module.entry)


def called_scopes(scope: Scope, instr: Instruction, trips: Mapping[str, int]) -> list[tuple[Scope, int]]:
    """Returns the computations that an instruction calls, each with its number of runs per call."""
    module = scope.module

    def inner(computation: Computation, branch: int = 0) -> Scope:
        return Scope(module, computation, scope, instr, branch)

    if instr.opcode == "while":
        condition, body = inner(module.called(instr, "condition")), inner(module.called(instr, "body"))
        num_trips = _num_trips(scope, instr, condition, body, trips)
        return [(condition, num_trips), (body, num_trips)]
    if instr.opcode == "conditional":
        if names := instr.attribute(r"branch_computations=\{([^}]*)\}"):
            branches = [module.computations[name] for name in re.findall(r"%?([^\s,]+)", names)]
        else:
            branches = [module.called(instr, key) for key in ("true_computation", "false_computation")]
        return [(inner(computation, branch), 1) for branch, computation in enumerate(branches)]
    if instr.opcode in CONTROL:
        key = "calls" if re.search(r"\bcalls=", instr.attributes) else "to_apply"
        return [(inner(module.called(instr, key)), 1)]
    return []


def _num_trips(scope: Scope, loop: Instruction, condition: Scope, body: Scope, trips: Mapping[str, int]) -> int:
    """Returns a loop's iterations: as the text gives them, then from `trips`, then as counted, else 1."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    for pattern, num_trips in trips.items():
        if re.search(pattern, loop.op_name):
            return num_trips
    return _counted_trips(scope, loop, condition, body) or 1


def _counted_trips(scope: Scope, loop: Instruction, condition: Scope, body: Scope) -> int | None:
    """Returns the iterations of a loop that counts up from a constant to a constant; TPU text does not give them."""
    test = condition.computation.resolve(condition.computation.root.name)[0]
    if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, path = condition.computation.resolve(test.operands[0])
    if counter.opcode != "parameter" or len(path) != 1:
        return None
    increment, increment_path = body.computation.resolve(body.computation.root.name, path)
    if increment.opcode != "add" or increment_path:
        return None
    _, previous, previous_path = body.source(increment.operands[0])
    start, stop = scope.constant(loop.operands[0], path), condition.constant(test.operands[1])
    if previous.opcode != "parameter" or previous_path != path or start is None or stop is None:
        return None
    step = body.constant(increment.operands[1])
    return max(0, -(-(stop - start) // step)) if step and step > 0 else None


def running(scope: Scope, trips: Mapping[str, int], runs: int = 1) -> Iterator[tuple[Scope, Instruction, int]]:
    """Yields every instruction that runs, those of all branches included, with its scope and number of runs."""
    for instr in scope.computation.instructions.values():
        yield scope, instr, runs
        for inner, runs_per_call in called_scopes(scope, instr, trips):
            yield from running(inner, trips, runs * runs_per_call)


def channel(instr: Instruction) -> str:
    """Returns a collective's opcode and channel, which identify it within a computation."""
    return f"{instr.opcode} {instr.attribute(r'channel_id=([0-9]+)')}"
