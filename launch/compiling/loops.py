"""How often a loop's body runs, from the text alone."""

from __future__ import annotations

import math
import re

from launch.compiling.hlo import Computation, Instruction, Module

_PASSED_ON = ("copy", "bitcast", "convert", "copy-start", "copy-done", "opt-barrier")


def trip_count(loop: Instruction, parent: Computation, module: Module) -> int | None:
    """Executions of a while's body; None where the text does not tell.

    XLA writes the count down where it knows it (CPU, GPU); a TPU's text only has the condition,
    `i < n`, whose start, bound and step are constants for every loop that jax.lax.scan makes.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    condition = module.computations[loop.called["condition"]]
    compared = _comparison(condition, module)
    if compared is None:
        return None
    direction, left, right = compared
    bound = _constant(right, condition, loop, parent)
    index = _index(left, condition)
    if bound is None or index is None:
        return None
    start = _initial(index, loop, parent)
    step = _step(index, module.computations[loop.called["body"]], module)
    if start is None or not step:
        return None
    inclusive = direction in ("LE", "GE")
    return max(0, math.ceil((bound - start + inclusive * (1 if step > 0 else -1)) / step))


def _comparison(condition: Computation, module: Module):
    """(direction, left, right) of the condition's root, seen through a fusion around it."""
    root = condition.root
    operands = condition.operands(root)
    if root.opcode == "fusion":
        inner = module.computations[root.called["calls"]]
        outer, root = operands, inner.root
        numbers = [_parameter(operand, inner) for operand in inner.operands(root)]
        operands = [
            outer[number] if number is not None else operand
            for number, operand in zip(numbers, inner.operands(root), strict=True)
        ]
    direction = root.attribute("direction")
    if root.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE") or len(operands) != 2:
        return None
    return direction, *operands


def _parameter(instruction: Instruction, computation: Computation) -> int | None:
    instruction = computation.origin(instruction, _PASSED_ON)
    return int(instruction.arguments) if instruction.opcode == "parameter" else None


def _index(instruction: Instruction, computation: Computation) -> int | None:
    """Which element of the computation's one (tuple) parameter an instruction is."""
    instruction = computation.origin(instruction, _PASSED_ON)
    if instruction.opcode != "get-tuple-element":
        return None
    [operand] = computation.operands(instruction)
    return int(instruction.attribute("index")) if operand.opcode == "parameter" else None


def _constant(
    instruction: Instruction, computation: Computation, loop: Instruction, parent: Computation
) -> int | None:
    instruction = computation.origin(instruction, _PASSED_ON)
    if instruction.opcode == "constant":
        return _number(instruction)
    index = _index(instruction, computation)
    return None if index is None else _initial(index, loop, parent)


def _number(instruction: Instruction) -> int | None:
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _initial(index: int, loop: Instruction, parent: Computation) -> int | None:
    """The constant that a loop's element starts as."""
    [carried] = parent.operands(loop)
    carried = parent.origin(carried, _PASSED_ON)
    if carried.opcode != "tuple":
        return None
    element = parent.origin(parent.by_name[carried.operands[index]], _PASSED_ON)
    return _number(element) if element.opcode == "constant" else None


def _step(index: int, body: Computation, module: Module) -> int | None:
    """What the body adds to the element; None where it is no constant."""
    if body.root.opcode != "tuple":
        return None
    added = body.origin(body.by_name[body.root.operands[index]], _PASSED_ON)
    inside, outer = body, None
    if added.opcode == "fusion":
        inside, outer = module.computations[added.called["calls"]], body.operands(added)
        added = inside.origin(inside.root, _PASSED_ON)
    if added.opcode not in ("add", "subtract"):
        return None
    for operand in inside.operands(added):
        operand = inside.origin(operand, _PASSED_ON)
        if outer is not None and operand.opcode == "parameter":
            operand = body.origin(outer[int(operand.arguments)], _PASSED_ON)
        if operand.opcode == "constant":
            number = _number(operand)
            return -number if number and added.opcode == "subtract" else number
    return None
