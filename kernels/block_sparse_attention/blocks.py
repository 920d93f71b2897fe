"""From a mask to the lists of its active blocks, on the host or on the device.

Each block is judged by the ranges of its operands (kernels/masks/expression.py): empty only if
surely nothing in it is seen, full only if surely everything is. Places where the parts of the
mask that are known on the host already show nothing are never candidates; where all of it is
known the lists are NumPy arrays. Otherwise the candidates are judged again on the device with the
run's data, and those that stay are moved to the front of lists of a size known beforehand.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.problem import (
    ACTIVE,
    ATOM_BIT,
    FIRST,
    LAST,
    MAX_ATOMS,
    PARTIAL,
    Blocks,
)
from kernels.masks import Builder
from kernels.masks.expression import ANYTHING, EVERYTHING, Expr, Range, Truth, evaluate

Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Grid:
    """A mask over blocks: its expression, its operands padded to whole blocks, and the blocks.

    Attributes:
      expr: the mask.
      build: holder of the operands.
      block_q, block_kv: slots of a block.
      row_bound: at most so many blocks of a row are active.
    """

    expr: Expr
    build: Builder
    block_q: int
    block_kv: int
    row_bound: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.build.q_len // self.block_q, self.build.kv_len // self.block_kv


def lists(grid: Grid) -> tuple[Blocks, Blocks]:
    """The active blocks by row and by column.

    Raises:
      ValueError: more block-level atoms than a flag has bits for.
    """
    if len(grid.build.atoms) > MAX_ATOMS:
        raise ValueError(f"a mask of {len(grid.build.atoms)} block patterns; at most {MAX_ATOMS}")
    if grid.shape == (1, 1) and not grid.build.atoms:
        return _only_block(grid), _only_block(grid)
    rows, cols = (np.arange(n, dtype=np.int32) for n in grid.shape)
    known = _judge(grid, rows[:, None], cols[None, :], host=True)
    any_, all_ = (
        np.broadcast_to(x, np.broadcast_shapes((1, 1, *grid.shape), np.shape(x)))
        for x in (known.any, known.all)
    )
    candidates = any_.any((0, 1))
    is_static = all(isinstance(x, np.ndarray) for x in _arrays(grid.build))

    def one(by_row: bool) -> Blocks:
        places = candidates.copy()
        empty = ~places.any(1 if by_row else 0)
        if by_row:
            places[empty, 0] = True
            r, c = np.nonzero(places)
        else:
            places[0, empty] = True
            c, r = np.nonzero(places.T)
        r, c = r.astype(np.int32), c.astype(np.int32)
        if is_static:
            truth = Truth(any_[..., r, c], all_[..., r, c])
        else:
            truth = _judge(grid, r, c, host=False)
        bound = grid.shape[0] * (min(grid.row_bound, grid.shape[1])) + max(grid.shape)
        capacity = int(min(r.size, bound))
        return _compact(grid, r, c, truth, by_row, is_static, capacity)

    return one(True), one(False)


def _only_block(grid: Grid) -> Blocks:
    """The list of a call that is one block, as short rows and decoding steps are: whatever its
    mask shows, it is computed."""
    partial = 0 if grid.expr == EVERYTHING else PARTIAL
    zero = np.zeros((1, 1, 1), np.int32)
    flags = zero + (FIRST | LAST | ACTIVE | partial)
    return Blocks(zero, zero, flags, np.array([[[0, 1]]], np.int32), is_static=True)


def _arrays(build: Builder) -> list[Array]:
    atoms = [atom.pattern for atom in build.atoms]
    return [*build.queries, *build.keys, *build.pairs, *atoms]


def _judge(grid: Grid, rows: np.ndarray, cols: np.ndarray, host: bool) -> Truth:
    """What is known of blocks (rows, cols), which broadcast to [.., n]; on the host, operands
    that are data of the run may be anything."""
    build = grid.build

    def leaf(op: str, index: int | None = None) -> Any:
        if op == "query_slot":
            return Range(rows * grid.block_q, rows * grid.block_q + (grid.block_q - 1))
        if op == "key_slot":
            return Range(cols * grid.block_kv, cols * grid.block_kv + (grid.block_kv - 1))
        if op == "atom":
            atom = build.atoms[index]
            if host and not isinstance(atom.pattern, np.ndarray):
                return ANYTHING
            value = atom_values(grid, index, rows, cols)
            return Range(value, value)
        values = {"query": build.queries, "key": build.keys, "pair": build.pairs}[op][index]
        if host and not isinstance(values, np.ndarray):
            return ANYTHING
        if op == "pair":
            lead = values.shape[:2]
            tiles = values.reshape(*lead, grid.shape[0], grid.block_q, grid.shape[1], grid.block_kv)
            return Range(tiles.min((3, 5))[..., rows, cols], tiles.max((3, 5))[..., rows, cols])
        block, place = (grid.block_q, rows) if op == "query" else (grid.block_kv, cols)
        tiles = values.reshape(*values.shape[:2], -1, block)
        return Range(tiles.min(-1)[..., place], tiles.max(-1)[..., place])

    truth = evaluate(grid.expr, leaf)
    return truth if isinstance(truth, Truth) else Truth(truth, truth)


def atom_values(grid: Grid, index: int, rows: np.ndarray, cols: np.ndarray) -> Array:
    """int32 [B or 1, H or 1, *n]: an atom at blocks (rows, cols); padding repeats the last."""
    atom = grid.build.atoms[index]
    last_row, last_col = (n - 1 for n in atom.pattern.shape[2:])
    r = np.minimum(rows * grid.block_q // atom.block_q, last_row)
    c = np.minimum(cols * grid.block_kv // atom.block_kv, last_col)
    return atom.pattern[..., r, c].astype(np.int32)


def _compact(
    grid: Grid,
    rows: np.ndarray,
    cols: np.ndarray,
    truth: Truth,
    by_row: bool,
    is_static: bool,
    capacity: int,
) -> Blocks:
    """Keeps the candidates that are active, and one of each line that has none.

    Args:
      rows, cols: int32 [n], candidates in the list's order, at least one a line.
      truth: of the candidates, [B or 1, H or 1, n].
      by_row: lines are rows.
      is_static: everything is NumPy's.
      capacity: entries of a dynamic list.
    """
    xp: ModuleType = np if is_static else jnp
    size, line = rows.size, rows if by_row else cols
    num_lines = grid.shape[0] if by_row else grid.shape[1]
    bits = 0
    for k in range(len(grid.build.atoms)):
        bits = bits | (atom_values(grid, k, rows, cols) << (ATOM_BIT + k))
    lead = np.broadcast_shapes(
        (1, 1), *(np.shape(x)[:2] for x in (truth.any, truth.all, bits) if np.ndim(x) > 2)
    )
    active, full, bits = (xp.broadcast_to(x, (*lead, size)) for x in (truth.any, truth.all, bits))

    starts = np.searchsorted(line, np.arange(num_lines + 1))
    before = running_count(xp, active)
    in_line = before[..., starts[1:]] - before[..., starts[:-1]]
    is_first = np.zeros(size, bool)
    is_first[starts[:-1]] = True
    keep = active | (is_first & (in_line == 0)[..., line])
    offsets = running_count(xp, xp.maximum(in_line, 1))

    total = offsets[..., -1:]
    slots = int(total.max()) if is_static else capacity
    chosen = _positions_of(xp, keep, slots)
    step = xp.minimum(xp.arange(slots, dtype=np.int32), total - 1)
    chosen = xp.take_along_axis(chosen, step, -1)
    place = xp.asarray(line)[chosen]
    begins, ends = (xp.take_along_axis(offsets, place + i, -1) for i in (0, 1))
    flags = xp.where(step == begins, FIRST, 0) | xp.where(step == ends - 1, LAST, 0)
    value = xp.where(active, ACTIVE | xp.where(full, 0, PARTIAL), 0) | bits
    flags = flags | xp.take_along_axis(value, chosen, -1)
    flags = xp.where(np.arange(slots) < total, flags, 0)
    entries = (xp.asarray(rows)[chosen], xp.asarray(cols)[chosen], flags, offsets)
    return Blocks(*(x.astype(np.int32) for x in entries), is_static=is_static)


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
