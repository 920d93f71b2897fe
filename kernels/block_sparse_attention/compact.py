"""Lists of candidates shortened to those that are active, on the host or on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.problem import ACTIVE, FIRST, LAST, PARTIAL, Blocks
from kernels.masks.expression import Truth

Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Blocks that may be active, line by line, at least one a line.

    Attributes:
      rows, cols: int32 [n], their places.
      starts: int32 [lines + 1], where lines start; what is behind the last is none.
    """

    rows: Array
    cols: Array
    starts: Array

    @staticmethod
    def of(places: np.ndarray, by_row: bool) -> Candidates:
        """Those of places [R, C] that are True; lines are rows or columns."""
        lines = (places if by_row else places.T).copy()
        lines[~lines.any(1), 0] = True
        line, other = (x.astype(np.int32) for x in np.nonzero(lines))
        starts = np.searchsorted(line, np.arange(lines.shape[0] + 1)).astype(np.int32)
        return Candidates(*((line, other) if by_row else (other, line)), starts)

    @staticmethod
    def one_of(choices: Sequence[Candidates], index: Array | int) -> Candidates:
        """The index-th of the choices, which the device may choose."""
        if len(choices) == 1:
            return choices[0]
        size = max(choice.rows.size for choice in choices)
        rows, cols = (
            np.stack([_lengthened(getattr(x, name), size) for x in choices])
            for name in ("rows", "cols")
        )
        stacks = rows, cols, np.stack([x.starts for x in choices])
        return Candidates(*(jnp.asarray(stack)[index] for stack in stacks))


def compact(
    candidates: Candidates, by_row: bool, truth: Truth, bits: Array | int, capacity: int | None
) -> Blocks:
    """Keeps the candidates that are active, and one of each line that has none.

    Args:
      candidates: in the list's order.
      by_row: lines are rows.
      truth: of the candidates, [B or 1, H or 1, n].
      bits: further flags of theirs, [B or 1, H or 1, n].
      capacity: entries of a dynamic list; None for a static one, where everything is NumPy's.
    """
    is_static = capacity is None
    xp: ModuleType = np if is_static else jnp
    rows, cols, starts = (xp.asarray(x) for x in dataclasses.astuple(candidates))
    line, size = rows if by_row else cols, rows.size
    lead = np.broadcast_shapes(
        (1, 1), *(np.shape(x)[:2] for x in (truth.any, truth.all, bits) if np.ndim(x) > 2)
    )
    active, full, bits = (xp.broadcast_to(x, (*lead, size)) for x in (truth.any, truth.all, bits))
    active = active & (np.arange(size) < starts[-1])

    before = running_count(xp, active)
    in_line = before[..., starts[1:]] - before[..., starts[:-1]]
    is_first = np.arange(size) == starts[line]
    keep = active | (is_first & (in_line == 0)[..., line])
    offsets = running_count(xp, xp.maximum(in_line, 1))

    total = offsets[..., -1:]
    slots = int(total.max()) if is_static else capacity
    chosen = _positions_of(xp, keep, slots)
    step = xp.minimum(xp.arange(slots, dtype=np.int32), total - 1)
    chosen = xp.take_along_axis(chosen, step, -1)
    place = line[chosen]
    begins, ends = (xp.take_along_axis(offsets, place + i, -1) for i in (0, 1))
    flags = xp.where(step == begins, FIRST, 0) | xp.where(step == ends - 1, LAST, 0)
    value = xp.where(active, ACTIVE | xp.where(full, 0, PARTIAL), 0) | bits
    flags = flags | xp.take_along_axis(value, chosen, -1)
    flags = xp.where(np.arange(slots) < total, flags, 0)
    entries = (rows[chosen], cols[chosen], flags, offsets)
    return Blocks(*(x.astype(np.int32) for x in entries), is_static=is_static)


def one_of(choices: Sequence[Blocks], index: Array | int) -> Blocks:
    """The index-th of static lists of one grid, which the device may choose."""
    if len(choices) == 1:
        return choices[0]
    lead = np.broadcast_shapes(*(choice.rows.shape[:2] for choice in choices))
    size = max(choice.rows.shape[-1] for choice in choices)
    stacks = []
    for name, behind in (("rows", None), ("cols", None), ("flags", 0)):
        arrays = [_lengthened(getattr(choice, name), size, behind) for choice in choices]
        stacks.append([np.broadcast_to(x, (*lead, size)) for x in arrays])
    stacks.append([np.broadcast_to(x.offsets, (*lead, x.num_lines + 1)) for x in choices])
    return Blocks(*(jnp.asarray(np.stack(x))[index] for x in stacks), is_static=False)


def _lengthened(x: np.ndarray, size: int, behind: int | None = None) -> np.ndarray:
    """x [.., n] as [.., size], with its last entry repeated, or `behind`, after it."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return np.pad(x, widths, mode="edge") if behind is None else np.pad(x, widths)


def running_count(xp: ModuleType, values: Array) -> Array:
    """int32 [.., n + 1]: the sums of the first 0, 1, .. n values."""
    total = xp.cumsum(values, -1, dtype=np.int32)
    return xp.concatenate([xp.zeros_like(total[..., :1]), total], -1)


def _positions_of(xp: ModuleType, keep: Array, slots: int) -> Array:
    """int32 [.., slots]: where keep [.., n] is True, in order; 0 beyond."""
    target = xp.where(keep, xp.cumsum(keep, -1, dtype=np.int32) - 1, slots)
    lead = np.indices((*keep.shape[:-1], 1), dtype=np.int32)[:-1]
    source = xp.broadcast_to(xp.arange(keep.shape[-1], dtype=np.int32), keep.shape)
    if xp is np:
        found = np.zeros((*keep.shape[:-1], slots + 1), np.int32)
        found[(*lead, target)] = source
    else:
        found = jnp.zeros((*keep.shape[:-1], slots + 1), np.int32).at[(*lead, target)].set(source)
    return found[..., :slots]
