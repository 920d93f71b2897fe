"""Biases inside the kernels: what is copied for a block, how it is added, and its gradient.

Tiles lie with keys down the sublanes and queries along the lanes, [bk, bq]. Gradients add up in
an output that stays in VMEM while a kernel walks one head's list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import bias as kinds
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.tpu.distances import OfDistance
from kernels.block_sparse_attention.tpu.steps import (
    NT,
    Operand,
    Output,
    Place,
    Steps,
    column,
    dot,
    per_block,
    per_pair_of_blocks,
)


@dataclasses.dataclass(frozen=True)
class NoBias:
    """Logits as they are."""

    is_resident = True

    def operands(self, steps: Steps) -> tuple[Operand, ...]:
        return ()

    def added(self, logits: jax.Array, refs: Any, keys: slice) -> jax.Array:
        return logits

    def gradient(self, steps: Steps) -> Output | None:
        return None

    def accumulate(
        self, ref: Any, place: Place, refs: Any, ds: jax.Array, keys: slice, before: Any
    ) -> None:
        pass

    def finish(self, total: jax.Array | None, heads: int) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class OfBucket:
    """A value a bucket of the distance of positions, found by comparing with thresholds."""

    problem: Problem
    bias: kinds.Buckets
    factor: float
    is_resident = True

    def operands(self, steps: Steps) -> tuple[Operand, ...]:
        block_q, block_kv = self.problem.block_q, self.problem.block_kv
        table = self.bias.table.astype(jnp.float32).T * self.factor
        count, lanes = table.shape[1], block_q
        table = jnp.broadcast_to(table[:, :, None], (*table.shape, lanes))
        heads = table.shape[0]
        q, kv = self.bias.q_positions, self.bias.kv_positions
        q_lead, kv_lead = (q.shape[0], 1), (kv.shape[0], 1)
        return (
            (table, steps.spec((None, count, lanes), lambda at: (at.lead((1, heads)), 0, 0))),
            (
                per_block(q, block_q),
                steps.spec((None, None, 1, block_q), lambda at: (at.lead(q_lead), at.row, 0, 0)),
            ),
            (
                per_block(kv, block_kv),
                steps.spec((None, None, 1, block_kv), lambda at: (at.lead(kv_lead), at.col, 0, 0)),
            ),
        )

    def _index(self, refs: Any, keys: slice) -> jax.Array:
        _, q, kv = refs
        return self.bias.index(column(kv[:, keys]) - q[...])

    def added(self, logits: jax.Array, refs: Any, keys: slice) -> jax.Array:
        index, table = self._index(refs, keys), refs[0]
        value = jnp.zeros_like(logits)
        for i in range(table.shape[0]):
            value = jnp.where(index == i, table[i : i + 1, :], value)
        return logits + value

    def gradient(self, steps: Steps) -> Output:
        shape = (steps.batch * steps.heads, self.bias.table.shape[0], self.problem.block_q)
        spec = steps.spec((None, *shape[1:]), lambda at: (at.head, 0, 0))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def accumulate(
        self, ref: Any, place: Place, refs: Any, ds: jax.Array, keys: slice, before: Any
    ) -> None:
        index = self._index(refs, keys)
        for i in range(ref.shape[0]):
            ref[i : i + 1, :] += jnp.where(index == i, ds, 0.0).sum(0, keepdims=True)

    def finish(self, total: jax.Array, heads: int) -> kinds.Buckets:
        buckets = self.bias.table.shape[0]
        total = total.reshape(-1, heads, buckets, total.shape[-1]).sum((0, 3)).T
        return dataclasses.replace(self.bias, table=total)


@dataclasses.dataclass(frozen=True)
class OfArray:
    """Any bias, written out: its blocks are copied, and its gradient's written, block by block."""

    problem: Problem
    bias: kinds.Array
    factor: float

    def operands(self, steps: Steps) -> tuple[Operand, ...]:
        array, block_kv = self.bias.array, self.problem.block_kv
        lead = array.shape[:2]
        if array.shape[2] == 1:
            spec = steps.spec((None, None, 1, block_kv), lambda at: (at.lead(lead), at.col, 0, 0))
            return ((per_block(array, block_kv), spec),)
        return ((self._tiles(array), self._spec(steps, lambda at: at.lead(lead))),)

    def _tiles(self, array: jax.Array) -> jax.Array:
        return per_pair_of_blocks(array, self.problem.block_q, self.problem.block_kv)

    def _spec(self, steps: Steps, lead: Callable[[Place], Any]) -> pl.BlockSpec:
        block = (None, None, None, self.problem.block_kv, self.problem.block_q)
        return steps.spec(block, lambda at: (lead(at), at.row, at.col, 0, 0))

    def added(self, logits: jax.Array, refs: Any, keys: slice) -> jax.Array:
        part = column(refs[0][:, keys]) if self.is_resident else refs[0][keys, :]
        return logits + part.astype(jnp.float32) * self.factor

    @property
    def is_resident(self) -> bool:
        return self.bias.array.shape[2] == 1

    def gradient(self, steps: Steps) -> Output:
        problem, lead = self.problem, self.bias.array.shape[:2]
        tiles = problem.q_len // problem.block_q, problem.kv_len // problem.block_kv
        if self.is_resident:
            shape = (steps.batch * steps.heads, tiles[1], problem.block_kv)
            spec = steps.spec((None, *shape[1:]), lambda at: (at.head, 0, 0))
        else:
            shape = (lead[0] * lead[1], *tiles, problem.block_kv, problem.block_q)
            spec = self._spec(steps, lambda at: at.lead(lead))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def accumulate(
        self, ref: Any, place: Place, refs: Any, ds: jax.Array, keys: slice, before: Any
    ) -> None:
        if self.is_resident:
            # A product with ones both sums over queries and lays the keys along the lanes.
            ones = jnp.ones((8, ds.shape[1]), ds.dtype)
            ref[pl.ds(place.col, 1), keys] += dot(ones, ds, NT)[:1]
        else:
            ref[keys, :] = ds if before is None else before[keys, :] + ds

    def finish(self, total: jax.Array, heads: int) -> kinds.Array:
        shape = self.bias.array.shape
        if not self.is_resident:
            return kinds.Array(total.transpose(0, 1, 4, 2, 3).reshape(shape))
        total = total.reshape(-1, heads, shape[2], shape[3])
        axes = tuple(i for i in (0, 1) if shape[i] == 1)
        return kinds.Array(total.sum(axes, keepdims=True))


Bias = NoBias | OfDistance | OfBucket | OfArray


def of(problem: Problem, bias: kinds.Lowered, factor: float) -> Bias:
    """What kernels do with a bias whose logits are multiplied by `factor`."""
    match bias:
        case None:
            return NoBias()
        case kinds.Distances():
            return OfDistance(problem, bias, factor)
        case kinds.Buckets():
            return OfBucket(problem, bias, factor)
        case kinds.Array():
            return OfArray(problem, bias, factor)
    raise TypeError(f"no kernel for a bias of type {type(bias).__name__}")
