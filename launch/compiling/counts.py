"""What a program does in one call: FLOPs, bytes and collectives, loops multiplied out.

XLA's own cost analysis counts a loop's body once, sees nothing in a Pallas call and takes every
branch of a conditional, so nothing here is from it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping

from launch.compiling import collectives, products
from launch.compiling.collectives import Collective
from launch.compiling.hlo import Computation, Instruction, Module
from launch.compiling.loops import trip_count
from launch.compiling.traffic import moved

# They only name or regroup what is there.
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
        "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that a device executes.

    Attributes:
      flops, bytes: of one execution: of products, and read from and written to main memory.
      times: executions a call of the program.
      products: (source, FLOPs) of each product in it, named as jax does.
      is_kernel: whether it is a Pallas kernel.
    """

    name: str
    flops: float
    bytes: float
    times: float
    products: tuple[tuple[str, float], ...] = ()
    is_kernel: bool = False


@dataclasses.dataclass
class Counts:
    """All of a program, of one device.

    Attributes:
      operations: what is executed but for collectives.
      collectives: each of them.
      loops: name -> (executions of its body, whether the text told so).
      opaque: kernels whose FLOPs are unknown -> executions.
    """

    operations: list[Operation] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    loops: dict[str, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    opaque: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> float:
        return sum(op.flops * op.times for op in self.operations)

    @property
    def bytes(self) -> float:
        return sum(op.bytes * op.times for op in self.operations)

    @property
    def unknown_loops(self) -> int:
        """Loops whose length the text does not tell."""
        return sum(not known for _, known in self.loops.values())

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.total for collective in self.collectives)


def count(module: Module, mesh: Mapping[str, int], *, unknown_trips: int = 1) -> Counts:
    """Counts a module.

    A conditional counts its cheaper branch: ours take the other only for rows that ask for more
    than usual.

    Args:
      mesh: axis -> size, in the order in which devices are numbered.
      unknown_trips: executions of a loop whose number is data, such as decoding's.
    """
    return _Counter(module, mesh, unknown_trips).run()


class _Counter:
    def __init__(self, module: Module, mesh: Mapping[str, int], unknown: int):
        self._module, self._mesh, self._unknown = module, mesh, unknown
        self._counts = Counts()
        self._fused: set[tuple[str, str]] = set()

    def run(self) -> Counts:
        self._walk(self._module.entry, 1.0)
        return self._counts

    def _walk(self, computation: Computation, times: float) -> None:
        for instruction in computation.instructions:
            self._one(instruction, computation, times)

    def _one(self, instruction: Instruction, computation: Computation, times: float) -> None:
        opcode = instruction.opcode
        if opcode in _FREE:
            return
        if opcode == "while":
            trips = self._trips(instruction, computation)
            self._walk(self._called(instruction, "body"), times * trips)
        elif opcode == "conditional":
            branches = [self._module.computations[name] for name in instruction.branches]
            self._walk(min(branches, key=self._flops_of), times)
        elif opcode in ("call", "async-start"):
            name = instruction.called.get("to_apply") or instruction.called.get("calls")
            self._walk(self._module.computations[name], times)
        elif collectives.kind_of(instruction):
            self._collective(instruction, computation, times)
        elif opcode == "fusion" and any(self._inside(instruction)):
            self._fused_collectives(instruction, computation, times)
            self._operation(instruction, computation, times)
        elif not opcode.endswith(("-done", "-update")):
            self._operation(instruction, computation, times)

    def _operation(self, instruction: Instruction, computation: Computation, times: float) -> None:
        if instruction.opcode == "fusion":
            found = tuple(self._products(self._called(instruction, "calls")))
        else:
            found = ((instruction.source, products.flops(instruction, computation)),)
        if products.is_opaque(instruction):
            name = instruction.source
            self._counts.opaque[name] = self._counts.opaque.get(name, 0.0) + times
        flops = sum(value for _, value in found)
        size = moved(instruction, computation, self._module)
        if flops or size:
            is_kernel = products.is_kernel(instruction)
            self._counts.operations.append(
                Operation(
                    instruction.name, flops, size, times, found if flops else (), is_kernel
                )
            )

    def _products(self, computation: Computation) -> Iterator[tuple[str, float]]:
        """(source, FLOPs) of the products in a fusion."""
        for instruction in computation.instructions:
            if instruction.opcode == "fusion":
                yield from self._products(self._called(instruction, "calls"))
            elif flops := products.flops(instruction, computation):
                yield instruction.source, flops

    def _collective(self, instruction: Instruction, computation: Computation, times: float, **how):
        found = collectives.read(
            instruction, computation, self._module, self._mesh, times, **how
        )
        if found.group > 1:
            self._counts.collectives.append(found)

    def _fused_collectives(self, fusion: Instruction, place: Computation, times: float) -> None:
        """Those in a fusion. A TPU fuses the start, the middle and the end of one that runs beside
        its neighbours with each of them: one channel in one place is one collective."""
        for instruction, inside in self._inside(fusion):
            channel = instruction.attribute("channel_id")
            if channel is not None:
                if (place.name, channel) in self._fused:
                    continue
                self._fused.add((place.name, channel))
            self._collective(
                instruction, inside, times,
                is_scattered=_is_cut(instruction, inside),
                is_apart=self._fusions_of(place.name)[channel] > 1,
            )  # fmt: skip

    def _inside(self, fusion: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Collectives in a fusion and in those that it is made of."""
        inside = self._called(fusion, "calls")
        for instruction in inside.instructions:
            if instruction.opcode == "fusion":
                yield from self._inside(instruction)
            elif collectives.kind_of(instruction):
                yield instruction, inside

    @functools.cache  # noqa: B019 - the counter lives for one count.
    def _fusions_of(self, place: str) -> collections.Counter[str]:
        """Channel -> fusions of a computation in which it appears."""
        found: collections.Counter[str] = collections.Counter()
        for instruction in self._module.computations[place].instructions:
            if instruction.opcode == "fusion":
                channels = {i.attribute("channel_id") for i, _ in self._inside(instruction)}
                found.update(channels - {None})
        return found

    def _trips(self, loop: Instruction, computation: Computation) -> int:
        told = trip_count(loop, computation, self._module)
        trips = self._unknown if told is None else told
        self._counts.loops[loop.name] = trips, told is not None
        return trips

    def _called(self, instruction: Instruction, attribute: str) -> Computation:
        return self._module.computations[instruction.called[attribute]]

    @functools.cache  # noqa: B019 - the counter lives for one count.
    def _flops_at(self, name: str) -> float:
        computation, total = self._module.computations[name], 0.0
        for instruction in computation.instructions:
            total += products.flops(instruction, computation)
            if instruction.opcode == "while":
                trips = trip_count(instruction, computation, self._module)
                trips = self._unknown if trips is None else trips
                total += trips * self._flops_at(instruction.called["body"])
            elif instruction.opcode == "conditional":
                total += min(map(self._flops_at, instruction.branches))
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = instruction.called
                total += self._flops_at(called.get("calls") or called["to_apply"])
        return total

    def _flops_of(self, computation: Computation) -> float:
        return self._flops_at(computation.name)


def _is_cut(instruction: Instruction, computation: Computation) -> bool:
    """Whether every user of a fused all-reduce's result cuts a piece out, each device its own.

    TPUs write a reduce-scatter so, as a fusion of the two. Outside of one the two are what they
    say: everything is summed everywhere.
    """
    if instruction.opcode != "all-reduce":
        return False
    users, names = [], [instruction.name]
    while names:
        for user in computation.users.get(names.pop(), ()):
            if user.opcode in ("bitcast", "get-tuple-element", "reshape", "copy"):
                names.append(user.name)
            else:
                users.append(user)
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
