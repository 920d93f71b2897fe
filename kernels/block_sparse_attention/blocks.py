"""From a mask to the lists of its active blocks, on the host or on the device.

Each block is judged by the ranges of its operands (kernels/masks/expression.py): empty only if
surely nothing in it is seen, full only if surely everything is. Places where the parts of the
mask that are known on the host already show nothing are never candidates; where all of it is
known the lists are NumPy arrays. Otherwise the candidates are judged again on the device with the
run's data, and those that stay are moved to the front of lists of a size known beforehand
(compact.py). Of a mask that is one of several, such as a part that only the device can name, each
is judged on the host, and the device chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.compact import Candidates, compact, one_of
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


def lists(grid: Grid, choices: Sequence[Grid], index: Array | int) -> tuple[Blocks, Blocks]:
    """The active blocks by row and by column.

    Args:
      choices: grids of the same blocks that `grid` is surely one of, as far as is known on the
        host; where they are known altogether, so are their lists, and the device chooses one.
      index: which of them it is.

    Raises:
      ValueError: more block-level atoms than a flag has bits for.
    """
    if len(grid.build.atoms) > MAX_ATOMS:
        raise ValueError(f"a mask of {len(grid.build.atoms)} block patterns; at most {MAX_ATOMS}")
    if grid.shape == (1, 1) and not grid.build.atoms:
        return _only_block(grid), _only_block(grid)
    truths = [known(choice) for choice in choices]
    is_static = all(isinstance(x, np.ndarray) for choice in choices for x in _arrays(choice.build))

    def one(by_row: bool) -> Blocks:
        found = [Candidates.of(np.asarray(x.any.any((0, 1))), by_row) for x in truths]
        if is_static:
            made = []
            for choice, truth, at in zip(choices, truths, found, strict=True):
                here = Truth(*(x[..., at.rows, at.cols] for x in (truth.any, truth.all)))
                made.append(compact(at, by_row, here, _bits(choice, at), None))
            return one_of(made, index)
        bound = grid.shape[0] * (min(grid.row_bound, grid.shape[1])) + max(grid.shape)
        at = Candidates.one_of(found, index)
        truth = _judge(grid, at.rows, at.cols, host=False)
        return compact(at, by_row, truth, _bits(grid, at), int(min(at.rows.size, bound)))

    return one(True), one(False)


def known(grid: Grid) -> Truth:
    """What the host knows of all blocks: bool [B or 1, H or 1, R, C] each."""
    rows, cols = (np.arange(n, dtype=np.int32) for n in grid.shape)
    truth = _judge(grid, rows[:, None], cols[None, :], host=True)
    return Truth(
        *(
            np.broadcast_to(x, np.broadcast_shapes((1, 1, *grid.shape), np.shape(x)))
            for x in (truth.any, truth.all)
        )
    )


def _bits(grid: Grid, at: Candidates) -> Array | int:
    """Flags of the atoms' values."""
    bits = 0
    for k in range(len(grid.build.atoms)):
        bits = bits | (atom_values(grid, k, at.rows, at.cols) << (ATOM_BIT + k))
    return bits


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


def _judge(grid: Grid, rows: Array, cols: Array, host: bool) -> Truth:
    """What is known of blocks (rows, cols), which broadcast to [.., n]; on the host, operands
    that are data of the run may be anything."""
    build = grid.build

    def of_blocks(values: Array, axes: tuple[int, ...], *places: Array) -> Range:
        least, most = (_at(x(axes), *places) for x in (values.min, values.max))
        return Range(least, most)

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
            return of_blocks(tiles, (3, 5), rows, cols)
        block, place = (grid.block_q, rows) if op == "query" else (grid.block_kv, cols)
        return of_blocks(values.reshape(*values.shape[:2], -1, block), (3,), place)

    truth = evaluate(grid.expr, leaf)
    return truth if isinstance(truth, Truth) else Truth(truth, truth)


def _at(values: Array, *places: Array) -> Array:
    """values[..., *places]; either may be the device's."""
    on_device = any(isinstance(place, jax.Array) for place in places)
    return (jnp.asarray(values) if on_device else values)[(..., *places)]


def atom_values(grid: Grid, index: int, rows: Array, cols: Array) -> Array:
    """int32 [B or 1, H or 1, *n]: an atom at blocks (rows, cols); padding repeats the last."""
    atom = grid.build.atoms[index]
    last_row, last_col = (n - 1 for n in atom.pattern.shape[2:])
    r = (rows * grid.block_q // atom.block_q).clip(max=last_row)
    c = (cols * grid.block_kv // atom.block_kv).clip(max=last_col)
    return _at(atom.pattern, r, c).astype(np.int32)
