"""What the Triton kernels share: sizes of tiles, loops over a line's tiles, logits of one tile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.block_sparse_attention.order import group_of
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.triton.lists import END, FULL, LINE, MASKED, Lines

SMALLEST = 16  # rows and columns of Triton's smallest product


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One kernel's tile and launch: slots of queries and keys, warps, stages of the pipeline."""

    q: int
    kv: int
    warps: int
    stages: int

    def fit(self, problem: Problem) -> Tiling:
        """With tiles that divide the problem's blocks: their largest powers of two at most."""
        q, kv = (
            min(tile, block & -block)
            for tile, block in ((self.q, problem.block_q), (self.kv, problem.block_kv))
        )
        # A warpgroup's product has 64 rows: two of them would share a smaller tile's columns.
        warps = max(4, self.warps * q * kv // (self.q * self.kv))
        return dataclasses.replace(self, q=q, kv=kv, warps=min(self.warps, warps))

    def fit_square(self, problem: Problem) -> Tiling:
        """Likewise, with one side for both axes."""
        fit = self.fit(problem)
        return dataclasses.replace(fit, q=min(fit.q, fit.kv), kv=min(fit.q, fit.kv))

    @property
    def params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of logits: where it lies, and whether keys run down it instead of queries.

    Attributes:
      batch, head: int32 scalars.
      q_start, kv_start: int32 scalars, its first slots.
      q, kv: its size.
      transposed: it is [kv, q].
    """

    batch: jax.Array
    head: jax.Array
    q_start: jax.Array
    kv_start: jax.Array
    q: int
    kv: int
    transposed: bool = False

    def along_q(self, x: jax.Array) -> jax.Array:
        """x [q], one value a query, shaped to broadcast over the tile."""
        return x[None, :] if self.transposed else x[:, None]

    def along_kv(self, x: jax.Array) -> jax.Array:
        return x[:, None] if self.transposed else x[None, :]

    def turned(self, x: jax.Array) -> jax.Array:
        """x [q, kv] as the tile lies."""
        return x.T if self.transposed else x

    @property
    def queries(self) -> pl.Slice:
        return pl.ds(self.q_start, self.q)

    @property
    def keys(self) -> pl.Slice:
        return pl.ds(self.kv_start, self.kv)

    @property
    def q_slot(self) -> jax.Array:
        return self.along_q(self.q_start + jnp.arange(self.q, dtype=jnp.int32))

    @property
    def kv_slot(self) -> jax.Array:
        return self.along_kv(self.kv_start + jnp.arange(self.kv, dtype=jnp.int32))

    def group(self, ref: Any) -> tuple[Any, Any]:
        return group_of(ref, self.batch, self.head)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], interpret: bool) -> jax.Array:
    """float32 product of tiles over one axis of each.

    float32 tiles are split in three TF32 products, which tensor cores compute and which lose next
    to nothing; one TF32 product would keep 11 bits.
    """
    precision = None
    if a.dtype == jnp.float32:
        exact, split = lax.Precision.HIGHEST, lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if interpret else split
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def exp2_of(x: jax.Array, factor: float, shift: jax.Array, interpret: bool) -> jax.Array:
    """exp2(x * factor - shift) in two instructions; shift broadcasts over x."""
    if interpret:
        return jnp.exp2(x * factor - shift)
    # The compiler keeps a product and its sum apart; an element has few instructions in all.
    return jnp.exp2(
        plgpu.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[x, jnp.full_like(x, factor), jnp.broadcast_to(-shift, x.shape)],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )[0]
    )


@dataclasses.dataclass(frozen=True)
class Line:
    """What one program does of a line of blocks.

    Attributes:
      group: its list's place in [Gb, Gh].
      start: int32, first slot of its tile.
      full, masked, end: int32, where full entries begin, where partial ones do, where these end.
    """

    group: tuple[Any, Any]
    start: jax.Array
    full: jax.Array
    masked: jax.Array
    end: jax.Array


def line_of(
    work: Lines, batch: jax.Array, head: jax.Array, position: jax.Array, block: int, size: int
) -> Line:
    """The position-th tile of `size` slots in the order of launch, of lines of `block` slots."""
    group = group_of(work.plan, batch, head)
    parts = block // size
    line, part = (position, 0) if parts == 1 else divide(position, parts)
    number, *bounds = (work.plan[(*group, line, i)] for i in (LINE, FULL, MASKED, END))
    return Line(group, number * block + part * size, *bounds)


def over_line(
    work: Lines,
    line: Line,
    block: int,
    size: int,
    body: Callable[[jax.Array, jax.Array | None, Any], Any],
    carry: Any,
) -> Any:
    """Loops over a line's tiles of `size` slots: those of full entries, then of partial ones.

    Args:
      body: (first slot on the list's other axis, flags, or None if full; carry) -> carry.
    """
    split = block // size
    last = work.other.shape[-1] - 1

    def entry(step: jax.Array) -> jax.Array:
        return jnp.minimum(step if split == 1 else divide(step, split)[0], last)

    def place(step: jax.Array) -> jax.Array:
        slot = work.other[(*line.group, entry(step))] * block
        return slot if split == 1 else slot + divide(step, split)[1] * size

    def one(has_mask: bool, step: jax.Array, carry: tuple[jax.Array, Any]):
        # The next tile's place is read a step ahead: copies of its keys need not wait for it.
        here, state = carry
        flags = work.flags[(*line.group, entry(step))] if has_mask else None
        return place(step + 1), body(here, flags, state)

    for has_mask, first, end, exists in (
        (False, line.full, line.masked, work.has_full),
        (True, line.masked, line.end, work.has_partial),
    ):
        if exists:
            first, end = first * split, end * split
            step = functools.partial(one, has_mask)
            carry = lax.fori_loop(first, end, step, (place(first), carry))[1]
    return carry


def divide(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of int32 x >= 0."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def visible(problem: Problem, operands: Any, tile: Tile, flags: jax.Array) -> jax.Array:
    """bool, as the tile lies. operands: refs of the problem's (query, key, pair)."""
    query, key, pair = operands
    return problem.tile(
        tile.q_slot,
        tile.kv_slot,
        [tile.along_q(ref[(*tile.group(ref), tile.queries)]) for ref in query],
        [tile.along_kv(ref[(*tile.group(ref), tile.keys)]) for ref in key],
        [tile.turned(ref[(*tile.group(ref), tile.queries, tile.keys)]) for ref in pair],
        flags,
    )
