"""Reads the text of an optimised HLO module: computations, instructions, shapes, attributes.

The text is what `jax.stages.Compiled.as_text` gives for TPU, GPU and CPU executables. Only what the
counts need is read; what an opcode means is told in counts.py, products.py and collectives.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

# Bits of an element.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: as XLA calls it.
      dims: sizes.
      space: 0 for the device's main memory; others are on chip (TPU) or the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _BITS.get(self.dtype, 8) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: of the result, a tuple's flattened.
      operands: names of instructions of the same computation.
      text: what stands after the operands: attributes, metadata, backend_config.
      arguments: what stands between the parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    arguments: str
    is_root: bool = False

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> Mapping[str, str]:
        """Attribute -> name of the computation that it calls."""
        return dict(_CALLED.findall(self.text))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        listed = _BRANCHES.search(self.text)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        names = (self.called.get(f"{side}_computation") for side in ("true", "false"))
        return tuple(name for name in names if name)

    def attribute(self, name: str) -> str | None:
        """The value of NAME=VALUE, its braces balanced; None where there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.text)
        if not found:
            return None
        rest = self.text[found.end():]
        if rest[:1] in "{[(":
            return rest[: _balanced(rest)]
        return re.match(r"[^, ]*", rest)[0]

    @property
    def source(self) -> str:
        """The operation that this came from, as jax names it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> Mapping[str, Sequence[Instruction]]:
        """Name -> instructions that take it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        return tuple(self.by_name[o] for o in instruction.operands if o in self.by_name)

    def origin(self, instruction: Instruction, opcodes: Collection[str]) -> Instruction:
        """What an instruction passes on, seen through those of some opcodes."""
        while instruction.opcode in opcodes and self.operands(instruction):
            instruction = self.operands(instruction)[0]
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: Computation
    partitions: int


def parse(text: str) -> Module:
    """A module's text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            parsed = tuple(filter(None, map(_instruction, lines)))
            computations[name] = Computation(name, parsed)
            name = None
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if not head:
        return None
    rest = line[head.end():]
    # A tuple's shape has spaces and parentheses, an array's neither a space nor a comment.
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)[0]
    rest = rest[len(opcode):]
    end = _balanced(rest)
    arguments = rest[1 : end - 1]
    operands = () if opcode in ("parameter", "constant") else tuple(_operands(arguments))
    return Instruction(
        head[2], opcode, arrays(shape), operands, rest[end:].lstrip(", "), arguments, bool(head[1])
    )


def _operands(arguments: str) -> Iterator[str]:
    """Names of operands, with or without their shapes before them."""
    marked = re.findall(r"%([\w.\-]+)", arguments)
    if marked:
        yield from marked
        return
    for part in re.sub(r"/\*.*?\*/", "", arguments).split(","):
        words = part.split()
        if words and re.fullmatch(r"[A-Za-z_][\w.\-]*", words[-1]):
            yield words[-1]


@functools.lru_cache(maxsize=4096)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in a shape's text."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _balanced(text: str) -> int:
    """Where the bracket that `text` begins with is closed, one past it; strings are skipped."""
    depth, at, quoted = 0, 0, False
    while at < len(text):
        character = text[at]
        if character == '"' and (at == 0 or text[at - 1] != "\\"):
            quoted = not quoted
        elif not quoted and character in "([{":
            depth += 1
        elif not quoted and character in ")]}":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return len(text)


def ints(text: str | None) -> tuple[int, ...]:
    """The whole numbers in an attribute."""
    return tuple(map(int, re.findall(r"\d+", text or "")))
