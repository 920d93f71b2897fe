"""The work of a launch: each line of blocks as a range of full and a range of partial tiles."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.compact import running_count
from kernels.block_sparse_attention.order import longest_first
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL, Problem

Array = np.ndarray | jax.Array

LINE, FULL, MASKED, END = range(4)  # columns of `Lines.plan`


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["plan", "other", "flags"],
    meta_fields=["has_full", "has_partial"],
)
@dataclasses.dataclass(frozen=True)
class Lines:
    """A list of blocks in the order in which programs take it.

    A line's full entries come before its partial ones, so that the loop over full blocks has no
    mask in it at all: a branch inside one loop would keep Triton from overlapping its products
    with its copies. Lines go by decreasing length: programs start in that order, and a line that
    sees everything (a global token) starts first rather than running on alone at the end.

    Attributes:
      plan: int32 [Gb, Gh, lines, 4]; a line's number, then where its full entries begin, where
        its partial ones begin and where these end.
      other: int32 [Gb, Gh, S], the block of an entry on the other axis.
      flags: int32 [Gb, Gh, S].
      has_full, has_partial: False where surely no line has such entries.
    """

    plan: Array
    other: Array
    flags: Array
    has_full: bool
    has_partial: bool


def lines(problem: Problem, *, by_row: bool, heads: int = 1) -> Lines:
    """The work of rows (forward, dq) or of columns (dk, dv).

    Args:
      heads: so many consecutive query heads go through their lines in one order.
    """
    blocks = problem.by_row if by_row else problem.by_col
    line, other = (blocks.rows, blocks.cols) if by_row else (blocks.cols, blocks.rows)
    xp = np if isinstance(blocks.flags, np.ndarray) else jnp
    kind = xp.where(blocks.flags & ACTIVE, xp.where(blocks.flags & PARTIAL, 1, 0), 2)
    # Entries past a group's end repeat its last line without ACTIVE: they stay behind it.
    order = xp.argsort(line * 3 + kind, axis=-1, stable=True)
    begin, end = blocks.offsets[..., :-1], blocks.offsets[..., 1:]
    full, partial = (
        xp.take_along_axis(count, end, -1) - xp.take_along_axis(count, begin, -1)
        for count in (running_count(xp, kind == 0), running_count(xp, kind == 1))
    )
    number = xp.broadcast_to(xp.arange(begin.shape[-1], dtype=np.int32), begin.shape)
    plan = xp.stack([number, begin, begin + full, begin + full + partial], -1)
    length = full + partial
    if heads > 1 and length.shape[1] > 1:
        groups = length.reshape(length.shape[0], -1, heads, length.shape[-1])
        length = xp.broadcast_to(groups.sum(2, keepdims=True), groups.shape).reshape(length.shape)
    return Lines(
        plan=xp.take_along_axis(plan, longest_first(length)[..., None], -2).astype(np.int32),
        other=xp.take_along_axis(other, order, -1),
        flags=xp.take_along_axis(blocks.flags, order, -1),
        has_full=bool((kind == 0).any()) if xp is np else True,
        has_partial=bool((kind == 1).any()) if xp is np else True,
    )
