"""Collectives of a program: kind, payload, bytes on the wire and the mesh axes they run over."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from launch.compiling.hlo import Array, Computation, Instruction, Module, ints

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: of KINDS, or "collective-broadcast".
      arrays: what it is about, whole: the gathered result, the summed or scattered input.
      axes: mesh axes that its groups run along; () where they are none of the mesh's.
      group: devices that take part together.
      wire: bytes that each device sends, by the ring algorithms: (n - 1) / n of an all-gather's
        result, of a reduce-scatter's or all-to-all's input, twice that of an all-reduce's, all of
        a permutation's.
      times: executions a step.
      asynchronous: whether something may run beside it.
      source: the operation it came from.
    """

    kind: str
    arrays: tuple[Array, ...]
    axes: tuple[str, ...]
    group: int
    wire: float
    times: float
    asynchronous: bool
    source: str

    @property
    def payload(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def total(self) -> float:
        """Bytes on the wire a step."""
        return self.wire * self.times


def kind_of(instruction: Instruction) -> str | None:
    """A collective's kind; None for all else, an asynchronous one's second half among it."""
    base = instruction.opcode.removeprefix("ragged-").removesuffix("-start")
    return base if base in (*KINDS, "collective-broadcast") else None


def read(
    instruction: Instruction,
    computation: Computation,
    module: Module,
    mesh: Mapping[str, int],
    times: float,
    is_scattered: bool = False,
    is_apart: bool = False,
) -> Collective:
    """The collective that an instruction is.

    Args:
      mesh: axis -> size, in the order in which devices are numbered.
      times: executions a step.
      is_scattered: whether each device cuts its own piece out of an all-reduce's result, and
        nothing else is done with it: a reduce-scatter.
      is_apart: whether it starts in one fusion and ends in another.
    """
    kind = kind_of(instruction)
    operands = [a for o in computation.operands(instruction) for a in o.arrays]
    results = list(instruction.arrays)
    asynchronous = instruction.opcode.endswith("-start")
    if kind == "collective-permute":
        axes, group = permuted_axes(instruction.attribute("source_target_pairs"), mesh), 2
        arrays = operands[:1] or results[:1]
    else:
        groups = groups_of(instruction, module.partitions)
        axes, group = axes_of(groups, mesh), len(groups[0]) if groups else 1
        if kind == "all-gather":
            # An asynchronous one's result also holds its operands.
            arrays = results[len(operands) :] if asynchronous else results
        else:
            arrays = operands
    arrays = [array for array in arrays if array.dtype not in ("token", "opaque")]
    if kind == "all-reduce" and is_scattered:
        kind = "reduce-scatter"
    payload = sum(array.bytes for array in arrays)
    share = (group - 1) / group if group else 0.0
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    wire = payload * factor.get(kind, share)
    return Collective(
        kind, tuple(arrays), axes, group, wire, times, asynchronous or is_apart,
        instruction.source,
    )  # fmt: skip


def groups_of(instruction: Instruction, partitions: int) -> list[list[int]]:
    """Device numbers of each group; all devices where none are named."""
    text = instruction.text
    found = re.search(r"replica_groups=", text)
    if not found:
        return [list(range(partitions))]
    rest = text[found.end():]
    if rest.startswith("mesh["):
        return _named_groups(rest)
    iota = re.match(r"(\[[\d,]+\])<=(\[[\d,]+\])(?:T\(([\d,]+)\))?", rest)
    if iota:
        numbers = _iota(ints(iota[2]), ints(iota[3]) if iota[3] else None)
        return numbers.reshape(ints(iota[1])).tolist()
    listed = re.match(r"\{(\{[\d,{}\s]*\})?\}", rest)
    groups = re.findall(r"\{([\d,\s]+)\}", listed[0]) if listed else []
    return [list(ints(group)) for group in groups] or [list(range(partitions))]


def _iota(dims: Sequence[int], order: Sequence[int] | None) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers if order is None else numbers.transpose(order)


def _named_groups(text: str) -> list[list[int]]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: groups along axes of a mesh of the
    compiler's own, of which 'a':(1)2 names a part."""
    sizes = re.match(r"mesh\[([^\]]*)\]", text)[1]
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    rest = text[text.index("]") + 1 :]
    order = re.match(r",? ?device_ids=\((.*?)\) \{", rest)
    numbers = np.arange(math.prod(sizes.values()))
    if order:
        turned = re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", order[1])
        numbers = _iota(*map(ints, turned.groups())) if turned else np.array(ints(order[1]))
        numbers = numbers.reshape(-1)
    along = re.search(r"\{([^}]*)\}", rest)[1]
    # Every axis is cut in parts (before, the part, after) so that a part can be an axis.
    dims, taken = [], []
    named = re.findall(r"'(\w+)'(?::\((\d+\)\d+))?", along)
    wanted = {name: ints(part) if part else None for name, part in named}
    for name, size in sizes.items():
        if name not in wanted:
            dims.append(size)
            continue
        before, part = wanted[name] or (1, size)
        taken.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    grid = numbers.reshape(dims)
    others = [axis for axis in range(len(dims)) if axis not in taken]
    width = math.prod(dims[axis] for axis in taken)
    return grid.transpose(*others, *taken).reshape(-1, width).tolist()


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which groups of devices run; () if they are not whole axes."""
    if not groups or len(groups[0]) < 2:
        return ()
    sizes = tuple(mesh.values())
    if max(map(max, groups)) >= math.prod(sizes):
        return ()
    places = np.array(np.unravel_index(np.asarray(groups[0]), sizes))
    varying = [axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1]
    whole = math.prod(mesh[axis] for axis in varying)
    return tuple(varying) if whole == len(groups[0]) else ()


def permuted_axes(pairs: str | None, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a permutation moves data."""
    numbers = np.array(ints(pairs)).reshape(-1, 2)
    sizes = tuple(mesh.values())
    if not len(numbers) or numbers.max() >= math.prod(sizes):
        return ()
    sources, targets = (np.array(np.unravel_index(n, sizes)) for n in numbers.T)
    moved = np.any(sources != targets, axis=1)
    return tuple(axis for axis, m in zip(mesh, moved, strict=True) if m)
