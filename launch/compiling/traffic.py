"""Bytes that an instruction reads from and writes to a device's main memory.

An upper estimate as every instruction is taken to read its operands and write its result whole,
except where it plainly touches a part: a slice that is cut out, a slice that is put in, in place.
What lies in on-chip memory moves nothing.
"""

from __future__ import annotations

import re

from launch.compiling.hlo import Array, Computation, Instruction, Module

# Custom calls of the TPU compiler that do nothing.
_ANNOTATION = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|Assume|AsyncCollective|GatherScatterIndices)'
)
_PART_READ = ("dynamic-slice", "slice", "gather")
_SEEN_THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose")


def moved(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes of one execution."""
    operands = computation.operands(instruction)
    match instruction.opcode:
        case "dynamic-slice" | "slice" | "gather":
            return 2 * _main(instruction.arrays)
        case "dynamic-update-slice":
            return 2 * _main(operands[1].arrays)
        case "scatter":
            return 2 * _main(operands[-1].arrays)
        case "copy-start":
            return _main(instruction.arrays[:1]) + _main(operands[0].arrays)
        case "slice-start":
            return _sliced(instruction, operands[0])
        case "fusion":
            return _fusion(instruction, operands, module)
        case "custom-call" if _ANNOTATION.search(instruction.text):
            return 0.0
    read = sum(_main(operand.arrays) for operand in operands)
    return read + _main(instruction.arrays)


def _main(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


def _sliced(start: Instruction, operand: Instruction) -> float:
    """Of a slice that is taken beside other work: its shape is (operand, slice, ...)."""
    piece = start.arrays[1]
    reads = 0.0 if operand.arrays[0].space else piece.bytes
    return reads + _main((piece,))


def _fusion(fusion: Instruction, operands: tuple[Instruction, ...], module: Module) -> float:
    inside = module.computations[fusion.called["calls"]]
    total, in_place = 0.0, {}
    results = inside.operands(inside.root) if inside.root.opcode == "tuple" else (inside.root,)
    for result, array in zip(results, fusion.arrays, strict=False):
        update = _update(result, inside)
        if update is None:
            total += _main((array,))
        else:
            target, size = update
            total += size if array.space == 0 else 0.0
            in_place[target] = size
    for number, operand in enumerate(operands):
        parameter = inside.parameters.get(number)
        if parameter is None or not operand.arrays or operand.arrays[0].space:
            continue
        part = in_place.get(parameter.name)
        total += _read(parameter, inside, operand.bytes, module) if part is None else 0.0
    return total


def _read(parameter: Instruction, inside: Computation, whole: float, module: Module) -> float:
    """Bytes of a fusion's operand that it, or a fusion in it, reads: the slices, where it only
    takes slices."""
    size, names, seen = 0.0, [parameter.name], set()
    while names:
        name = names.pop()
        for user in inside.users.get(name, ()):
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.opcode in _PART_READ and user.operands[0] == name:
                size += user.bytes
            elif user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                inner = module.computations[user.called["calls"]]
                places = (n for n, operand in enumerate(user.operands) if operand == name)
                size += sum(_read(inner.parameters[n], inner, whole, module) for n in places)
            else:
                return whole
    return min(size, whole)


def _update(result: Instruction, inside: Computation) -> tuple[str, float] | None:
    """(parameter, bytes) where a fusion's result is one of its operands with a slice replaced."""
    result = inside.origin(result, _SEEN_THROUGH)
    if result.opcode != "dynamic-update-slice":
        return None
    target, update = inside.operands(result)[:2]
    return inside.origin(target, _SEEN_THROUGH).name, update.bytes
