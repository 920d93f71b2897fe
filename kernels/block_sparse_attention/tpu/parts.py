"""Calls whose lists of blocks do not fit scalar memory together, in parts that do.

A part is one row of the batch and some of its heads; parts run one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import bias as kinds
from kernels.block_sparse_attention.manual import vary_like
from kernels.block_sparse_attention.problem import Blocks, Problem
from kernels.block_sparse_attention.tpu.steps import list_bytes

# Of a megabyte of scalar memory; the rest is the compiler's.
MAX_LIST_BYTES = 960 * 1024


def heads_at_once(problem: Problem, kv_heads: int) -> int | None:
    """KV heads of a part; None if even one head's list does not fit, 0 if no parts are needed."""
    groups, size = problem.by_row.rows.shape[:2], list_bytes(problem)
    if groups[0] * groups[1] * size <= MAX_LIST_BYTES:
        return 0
    fitting = (
        n
        for n in range(kv_heads, 0, -1)
        if kv_heads % n == 0 and -(-groups[1] * n // kv_heads) * size <= MAX_LIST_BYTES
    )
    return next(fitting, None)


@dataclasses.dataclass(frozen=True)
class Part:
    """Row `row` of a batch and its kv heads from `kv_head` on, of [B, H or N, ...] arrays."""

    row: jax.Array
    kv_head: jax.Array
    size: int
    batch: int
    heads: int
    kv_heads: int

    def _heads(self, x: jax.Array, axis: int) -> jax.Array:
        """Its heads of an axis that is 1, N or H long."""
        length = x.shape[axis]
        if length == 1:
            return x
        each = length // self.kv_heads
        return jax.lax.dynamic_slice_in_dim(x, self.kv_head * each, self.size * each, axis)

    def _row(self, x: jax.Array) -> jax.Array:
        return x if x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, self.row, 1, 0)

    def take(self, x: jax.Array) -> jax.Array:
        return self._heads(self._row(jnp.asarray(x)), 1)

    def added(self, total: jax.Array, part: jax.Array) -> jax.Array:
        """`total` [B or 1, H or 1, ...] with `part` added where `take` would take it."""
        rows, heads = total.shape[:2]
        first = self.kv_head * (heads // self.kv_heads) if heads > 1 else 0
        start = (self.row if rows > 1 else 0, first, *[0] * (total.ndim - 2))
        before = jax.lax.dynamic_slice(total, start, part.shape)
        return jax.lax.dynamic_update_slice(total, before + part, start)

    def bias(self, bias: kinds.Lowered) -> kinds.Lowered:
        match bias:
            case kinds.Distances():
                return kinds.Distances(self._heads(bias.values, 0))
            case kinds.Buckets():
                return dataclasses.replace(
                    bias,
                    table=self._heads(bias.table, 1),
                    q_positions=self._row(bias.q_positions),
                    kv_positions=self._row(bias.kv_positions),
                )
            case kinds.Array():
                return kinds.Array(self.take(bias.array))
        return None


def taken(problem: Problem, take: Callable[[jax.Array], jax.Array]) -> Problem:
    """A problem whose [Gb, Gh, ...] arrays `take` shortens. Lists that all share stay as they
    are."""

    def blocks(x: Blocks) -> Blocks:
        if x.rows.shape[:2] == (1, 1):
            return x
        rows, cols, flags, offsets = map(take, (x.rows, x.cols, x.flags, x.offsets))
        return Blocks(rows, cols, flags, offsets, is_static=False)

    return dataclasses.replace(
        problem,
        by_row=blocks(problem.by_row),
        by_col=blocks(problem.by_col),
        query=tuple(map(take, problem.query)),
        key=tuple(map(take, problem.key)),
        pair=tuple(map(take, problem.pair)),
    )


def mapped(
    function: Callable[..., Any],
    problem: Problem,
    bias: kinds.Lowered,
    *arrays: jax.Array,
    with_bias_gradient: bool = False,
) -> Any:
    """function(problem, bias, *arrays), whole or by parts.

    Its results are [B, H or N, ...] arrays, after the gradient of the bias where it gives one. That
    of a written-out bias is added up part by part: it may be as large as Q * K.
    """
    (batch, heads), kv_heads = arrays[0].shape[:2], arrays[1].shape[1]
    size = heads_at_once(problem, kv_heads)
    if not size:
        return function(problem, bias, *arrays)

    def one(total: jax.Array | None, index: jax.Array) -> Any:
        row, part = index // (kv_heads // size), index % (kv_heads // size)
        at = Part(row, part * size, size, batch, heads, kv_heads)
        results = function(taken(problem, at.take), at.bias(bias), *map(at.take, arrays))
        if total is None:
            return None, results
        return at.added(total, results[0].array), (None, *results[1:])

    def whole(x: Any) -> Any:
        match x:
            case kinds.Distances():
                shape = batch, heads, x.values.shape[-1]
                return kinds.Distances(x.values.reshape(shape).sum(0))
            case kinds.Buckets():
                table = x.table.reshape(batch, -1, *x.table.shape[1:]).sum(0)
                table = jnp.moveaxis(table, 0, 1).reshape(x.table.shape[1], heads)
                return dataclasses.replace(bias, table=table)
            case None:
                return None
        return x.reshape(batch, -1, *x.shape[3:])

    total = None
    if with_bias_gradient and isinstance(bias, kinds.Array):
        total = vary_like(jnp.zeros(bias.array.shape, jnp.float32), bias, arrays)
    total, results = jax.lax.scan(one, total, jnp.arange(batch * (kv_heads // size)))
    results = tuple(map(whole, results))
    return results if total is None else (kinds.Array(total), *results[1:])
