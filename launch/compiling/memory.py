"""What lies in a device's memory: the state by name, a program's largest arrays by source."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from launch.compiling.hlo import Computation, Instruction, Module

_ALIASES = frozenset(
    {
        "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "conditional",
        "call", "opt-barrier", "after-all", "copy-done", "async-done", "all-gather-done",
        "all-reduce-done", "collective-permute-done",
    }
)  # fmt: skip
_SEEN_THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Memory:
    """XLA's own analysis, bytes of one device.

    Attributes:
      arguments, outputs: of which `aliased` are one and the same (the donated state).
      temporaries: all else that the program allocates.
      peak: the most at once, as XLA plans it, or the sum of the above where it does not say.
      code: the program itself.
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    peak: float
    code: float


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a device.

    Attributes:
      name: a parameter's path, or the operation that an activation comes from.
      shape: on a device, with dtype.
      bytes: of it, or of `count` like it together.
    """

    name: str
    shape: str
    bytes: float
    count: int = 1


def of(compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program."""
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    aliased, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    # XLA's own peak; a CPU's leaves temporaries out.
    peak = stats.peak_memory_in_bytes
    if peak < arguments + temporaries / 8:
        peak = arguments + outputs - aliased + temporaries
    code = stats.generated_code_size_in_bytes
    return Memory(arguments, outputs, aliased, temporaries, peak, code)


def on_device(leaf: Any) -> float:
    """Bytes that each device holds of an array with a sharding."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def state_tensors(state: Any) -> list[Tensor]:
    """Every array of a state template, as a device holds it."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = ",".join(map(str, leaf.sharding.shard_shape(leaf.shape)))
        found.append(Tensor(name, f"{leaf.dtype.name}[{shape}]", on_device(leaf)))
    return found


def parts_of(state: Any) -> dict[str, float]:
    """Bytes of a device's parameters, optimiser state and frozen trees."""
    named = {"parameters": state.params, "optimizer": state.opt_state, "frozen": state.frozen}
    return {name: sum(map(on_device, jax.tree.leaves(tree))) for name, tree in named.items()}


def largest_activations(module: Module, count: int = 12) -> list[Tensor]:
    """The largest arrays that a program makes in main memory, equal ones of one source together.

    How many of them live at once the text does not tell; what layers keep for the backward pass
    (a leading axis of layers) lives longest.
    """
    groups: dict[tuple[str, str], Tensor] = {}
    in_loops: dict[str, set[tuple[str, str]]] = {}
    for computation in _executed(module):
        for instruction in computation.instructions:
            if instruction.opcode in _ALIASES or instruction.opcode.endswith("-done"):
                continue
            for number, array in enumerate(instruction.arrays):
                if array.space or array.bytes < 1024:
                    continue
                source = _source(instruction, number, computation, module)
                key = short(source), str(array)
                if key in in_loops.setdefault(computation.name, set()) and _updates(instruction):
                    continue
                in_loops[computation.name].add(key)
                known = groups.get(key)
                times = known.count + 1 if known else 1
                groups[key] = Tensor(key[0], key[1], array.bytes, times)
    ordered = sorted(groups.values(), key=lambda tensor: -tensor.bytes)
    return ordered[:count]


def _executed(module: Module) -> list[Computation]:
    """Computations whose instructions run one by one: the entry's, loops' and branches'."""
    found, names = [], [module.entry.name]
    while names:
        computation = module.computations[names.pop()]
        if computation in found:
            continue
        found.append(computation)
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                names.append(instruction.called["body"])
            names += instruction.branches if instruction.opcode == "conditional" else ()
            if instruction.opcode == "call":
                names.append(instruction.called["to_apply"])
    return found


def _updates(instruction: Instruction) -> bool:
    return "dynamic-update-slice" in instruction.name or "dynamic_update_slice" in instruction.name


def _source(
    instruction: Instruction, number: int, computation: Computation, module: Module
) -> str:
    """Where an array comes from; for slices put into a stack, where the slices do."""
    inside, root, outer = computation, instruction, ()
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called["calls"]]
        root, outer = inside.root, computation.operands(instruction)
        if root.opcode == "tuple" and number < len(inside.operands(root)):
            root = inside.operands(root)[number]
    root = inside.origin(root, _SEEN_THROUGH)
    if root.opcode != "dynamic-update-slice":
        return root.source if "op_name=" in root.text else instruction.source
    update = inside.origin(inside.operands(root)[1], _SEEN_THROUGH)
    if update.opcode == "parameter" and outer and int(update.arguments) < len(outer):
        update = outer[int(update.arguments)]
    return update.source


def short(source: str) -> str:
    """An operation's name without what every one of them begins with."""
    backward = "transpose(" in source
    again = "rematted_computation" in source
    skipped = r"jit\(\w+\)/|closed_call/|while/body/|checkpoint/|rematted_computation/"
    name = re.sub(skipped, "", source)
    name = re.sub(r"(transpose|jvp)\(+[\w.]*\)+/?", "", name)
    name = re.sub(r"\b(\w+)\.(\w+)(?=/)", r"\2", name)
    name = re.sub(r"(_run|_blocks|_sublayer|_call|_attend|run|hidden|shard_map)/", "", name)
    kind = "recomputed " if again else "gradient " if backward else ""
    return kind + re.sub(r"/+", "/", name).strip("/")


def stage_of(source: str) -> str:
    """"forward", "backward", "recomputed", "optimizer" or "other" (of no name)."""
    if "/optimizer/" in source:
        return "optimizer"
    if "rematted_computation" in source:
        return "recomputed"
    if "transpose(" in source:
        return "backward"
    return "forward" if "jvp(" in source else "other"
