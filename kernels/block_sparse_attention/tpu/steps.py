"""The grid of a kernel: one step an entry of a list of active blocks, read from scalar memory.

Lists are prefetched into SMEM before a kernel starts, so that index maps can say which blocks to
copy next (`pltpu.PrefetchScalarGridSpec`). A repeated place copies nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL, Blocks, Problem

# An array that a kernel reads or writes, and its blocks.
Operand = tuple[jax.Array, pl.BlockSpec]
Output = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]

# One word holds an entry of up to 4096 rows and columns: row 12 bits, column 12, flags 8.
_FLAG_BITS, _PLACE_BITS, _WIDE_BITS = 8, 12, 16
MAX_LINES = 1 << _WIDE_BITS


@dataclasses.dataclass(frozen=True)
class Steps:
    """A packed list, and which heads a grid walks it for.

    The grid is (B * H, steps), or (B * N, steps, H / N) where the query heads that share a kv
    head follow each other within a step.

    Attributes:
      words: int32 [Gb * Gh * S] each: one packed word an entry, or two, place and flags.
      groups: (Gb, Gh).
      num_steps: see Blocks.
      batch, heads, kv_heads: B, H, N.
      heads_inside: the second kind of grid.
      has_full, has_partial: whether entries may be ACTIVE without and with PARTIAL.
    """

    words: tuple[jax.Array | np.ndarray, ...]
    groups: tuple[int, int]
    num_steps: int | jax.Array
    batch: int
    heads: int
    kv_heads: int
    heads_inside: bool
    has_full: bool
    has_partial: bool

    @classmethod
    def of(cls, problem: Problem, by: str, q: jax.Array, k: jax.Array) -> Steps:
        """The steps of the list `by` "row" or "col", which the heads of a group share if they
        can."""
        blocks = problem.by_row if by == "row" else problem.by_col
        batch, heads = q.shape[:2]
        groups = blocks.rows.shape[:2]
        has_full = has_partial = True
        if blocks.is_static:
            active = blocks.flags & ACTIVE != 0
            partial = blocks.flags & PARTIAL != 0
            has_full, has_partial = bool((active & ~partial).any()), bool((active & partial).any())
        return cls(
            words=_pack(blocks, _is_wide(problem)),
            groups=groups,
            num_steps=blocks.num_steps,
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            heads_inside=by == "col" and heads > k.shape[1] and groups[1] == 1,
            has_full=has_full,
            has_partial=has_partial,
        )

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def grid(self) -> tuple[int | jax.Array, ...]:
        if self.heads_inside:
            return self.batch * self.kv_heads, self.num_steps, self.group
        return self.batch * self.heads, self.num_steps

    def spec(self, block: Sequence[int | None], index: Callable[[Place], tuple]) -> pl.BlockSpec:
        """Blocks of an array at index(place of the step)."""
        dims = len(self.grid)
        return pl.BlockSpec(tuple(block), lambda *a: index(Place(self, a[:dims], a[dims:])))

    def compiler_params(self) -> pltpu.CompilerParams:
        """Heads may be split between the cores of a chip. Places come from lists that are right
        by construction, so copies need no check of their bounds."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", *("arbitrary",) * (len(self.grid) - 1)),
            disable_bounds_checks=True,
        )

    def when_active(self, flags: jax.Array, block: Callable[[bool], None]) -> None:
        """Runs block(masked) if the step's block is active: the mask costs full ones nothing."""
        kind = flags & (ACTIVE | PARTIAL)
        if self.has_full:
            pl.when(kind == ACTIVE)(lambda: block(False))
        if self.has_partial:
            pl.when(kind == ACTIVE | PARTIAL)(lambda: block(True))

    def at_first_head(self, condition: jax.Array) -> jax.Array:
        return condition & (pl.program_id(2) == 0) if self.heads_inside else condition

    def at_last_head(self, condition: jax.Array) -> jax.Array:
        return condition & (pl.program_id(2) == self.group - 1) if self.heads_inside else condition

    def here(self, words: Sequence[Any]) -> Place:
        """The place of the running step."""
        return Place(self, tuple(pl.program_id(i) for i in range(len(self.grid))), words)


class Place:
    """One step: its heads, its block and its flags. What is not asked for is not read."""

    def __init__(self, steps: Steps, ids: Sequence[Any], words: Sequence[Any]):
        self._steps, self._ids, self._words = steps, ids, words

    @property
    def head(self) -> Any:
        """b * H + h of the query head."""
        if self._steps.heads_inside:
            return self._ids[0] * self._steps.group + self._ids[2]
        return self._ids[0]

    @property
    def kv_head(self) -> Any:
        """b * N + n of the kv head."""
        if self._steps.heads_inside or self._steps.group == 1:
            return self._ids[0]
        return jax.lax.div(self._ids[0], np.int32(self._steps.group))

    def lead(self, sizes: tuple[int, int]) -> Any:
        """Flat index of this head in leading axes (B or 1, H or 1)."""
        heads = self._steps.heads
        if sizes == (1, 1):
            return 0
        if sizes[1] == 1:
            return jax.lax.div(self.head, np.int32(heads)) if heads > 1 else self.head
        if sizes[0] == 1 and self._steps.batch > 1:
            return jax.lax.rem(self.head, np.int32(heads))
        return self.head

    def _word(self, index: int) -> Any:
        step, groups = self._ids[1], self._steps.groups
        if groups != (1, 1):
            capacity = self._steps.words[0].shape[0] // (groups[0] * groups[1])
            step = self.lead(groups) * capacity + step
        return self._words[index][step]

    @property
    def row(self) -> Any:
        bits = _WIDE_BITS if len(self._words) == 2 else _FLAG_BITS + _PLACE_BITS
        return jax.lax.shift_right_logical(self._word(0), np.int32(bits))

    @property
    def col(self) -> Any:
        if len(self._words) == 2:
            return self._word(0) & (MAX_LINES - 1)
        shifted = jax.lax.shift_right_logical(self._word(0), np.int32(_FLAG_BITS))
        return shifted & ((1 << _PLACE_BITS) - 1)

    @property
    def flags(self) -> Any:
        if len(self._words) == 2:
            return self._word(1)
        return self._word(0) & ((1 << _FLAG_BITS) - 1)


# Contractions of matrices: a b and a b^T.
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def dot(a: jax.Array, b: jax.Array, dims: tuple) -> jax.Array:
    """A product summed in float32; float32 operands keep all their bits."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def column(row: jax.Array) -> jax.Array:
    """[1, n] turned to [n, 1]."""
    return jnp.expand_dims(row[0], -1)


def per_block(x: jax.Array, block: int) -> jax.Array:
    """[..., L] as [lead, L / block, 1, block]: rows that any length of block may be copied from."""
    return x.reshape(-1, x.shape[-1] // block, 1, block)


def per_pair_of_blocks(x: jax.Array, block_q: int, block_kv: int) -> jax.Array:
    """[.., .., Q, K] as [lead, Q / block_q, K / block_kv, block_kv, block_q]: transposed tiles."""
    shape = -1, x.shape[-2] // block_q, block_q, x.shape[-1] // block_kv, block_kv
    return x.reshape(shape).transpose(0, 1, 3, 4, 2)


def _is_wide(problem: Problem) -> bool:
    """Whether an entry takes two words."""
    return max(problem.by_row.num_lines, problem.by_col.num_lines) > 1 << _PLACE_BITS


def list_bytes(problem: Problem) -> int:
    """Scalar memory that the longer of a group's two lists takes."""
    entries = max(problem.by_row.rows.shape[-1], problem.by_col.rows.shape[-1])
    return entries * (8 if _is_wide(problem) else 4)


def _pack(blocks: Blocks, wide: bool) -> tuple[jax.Array | np.ndarray, ...]:
    xp = np if blocks.is_static else jnp
    rows, cols, flags = (
        x.reshape(-1).astype(np.uint32) for x in (blocks.rows, blocks.cols, blocks.flags)
    )
    if wide:
        words = rows << _WIDE_BITS | cols, flags
    else:
        words = ((rows << _PLACE_BITS | cols) << _FLAG_BITS | flags,)
    return tuple(xp.asarray(word).view(np.int32) for word in words)
