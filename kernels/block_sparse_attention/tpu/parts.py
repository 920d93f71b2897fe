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

    def problem(self, problem: Problem) -> Problem:
        def blocks(x: Blocks) -> Blocks:
            rows, cols, flags, offsets = map(self.take, (x.rows, x.cols, x.flags, x.offsets))
            return Blocks(rows, cols, flags, offsets, is_static=False)

        return dataclasses.replace(
            problem,
            by_row=blocks(problem.by_row),
            by_col=blocks(problem.by_col),
            query=tuple(map(self.take, problem.query)),
            key=tuple(map(self.take, problem.key)),
            pair=tuple(map(self.take, problem.pair)),
        )

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


def mapped(
    function: Callable[..., Any], problem: Problem, bias: kinds.Lowered, *arrays: jax.Array
) -> Any:
    """function(problem, bias, *arrays), whole or by parts.

    Its results are [B, H or N, ...] arrays, or gradients of the bias.
    """
    (batch, heads), kv_heads = arrays[0].shape[:2], arrays[1].shape[1]
    size = heads_at_once(problem, kv_heads)
    if not size:
        return function(problem, bias, *arrays)

    def one(index: jax.Array) -> Any:
        row, part = index // (kv_heads // size), index % (kv_heads // size)
        at = Part(row, part * size, size, batch, heads, kv_heads)
        return function(at.problem(problem), at.bias(bias), *map(at.take, arrays))

    def whole(x: Any) -> Any:
        match x:
            case kinds.Distances():
                shape = batch, heads, x.values.shape[-1]
                return kinds.Distances(x.values.reshape(shape).sum(0))
            case kinds.Buckets():
                table = x.table.reshape(batch, -1, *x.table.shape[1:]).sum(0)
                table = jnp.moveaxis(table, 0, 1).reshape(x.table.shape[1], heads)
                return dataclasses.replace(bias, table=table)
            case kinds.Array():
                total = x.array.reshape(batch, -1, *x.array.shape[3:])
                axes = tuple(i for i in (0, 1) if bias.array.shape[i] == 1)
                return kinds.Array(total.sum(axes, keepdims=True))
            case None:
                return None
        return x.reshape(batch, -1, *x.shape[3:])

    parts = jax.lax.map(one, jnp.arange(batch * (kv_heads // size)))
    return tuple(map(whole, parts))
