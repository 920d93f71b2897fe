"""Gradients of the bias, by kernels of their own: where nobody asks for them XLA drops them.

Each recomputes the gradient of the logits, tile by tile, in an order that lets a program keep its
sum in registers. Atomic additions of tiles, the alternative that would need no second pass, would
serialise (a diagonal's elements share one address) and would sum in another order every run.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.bias import Array, Buckets, Lowered
from kernels.block_sparse_attention.order import group_of
from kernels.block_sparse_attention.problem import ACTIVE, Problem
from kernels.block_sparse_attention.softmax import LOG2_E
from kernels.block_sparse_attention.triton.biases import buckets, for_kernel
from kernels.block_sparse_attention.triton.diagonals import of_distances
from kernels.block_sparse_attention.triton.lists import Lines, lines
from kernels.block_sparse_attention.triton.recompute import Inputs, Launch
from kernels.block_sparse_attention.triton.tiles import (
    Tile,
    Tiling,
    divide,
    line_of,
    over_line,
)


def bias_gradient(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    tiling: Tiling,
    *,
    interpret: bool,
) -> Lowered:
    """A bias with the float32 gradient as its first leaf; the tiling's tiles are square."""
    if bias is None:
        return None
    operands = problem.query, problem.key, problem.pair
    known = for_kernel(bias, problem.q_len, transposed=False)
    inputs = Inputs(operands, known, q, k, v, lse * LOG2_E, delta, d_out)
    launch = Launch(problem, tiling, interpret)
    if isinstance(bias, Buckets):
        return dataclasses.replace(bias, table=_of_buckets(launch, inputs))
    if isinstance(bias, Array):
        one_row = bias.array.shape[2] == 1
        return Array(_of_keys(launch, inputs) if one_row else _of_pairs(launch, inputs))
    return dataclasses.replace(bias, values=of_distances(launch, inputs))


def _of_buckets(launch: Launch, inputs: Inputs) -> jax.Array:
    """[num_buckets, H]: a program sums a row of blocks by bucket."""
    batch, heads, q_len, _ = inputs.q.shape
    rows, num_buckets = q_len // launch.tiling.q, inputs.bias.table.shape[0]
    padded = pl.next_power_of_2(num_buckets)
    work = lines(launch.problem, by_row=True)
    sums = launch(_by_bucket, (heads, batch, rows), (batch, heads, rows, padded), work, inputs)
    return sums.sum((0, 2)).T[:num_buckets]


def _by_bucket(work: Lines, inputs: Inputs, out_ref, *, launch: Launch) -> None:
    head, batch, position = (pl.program_id(axis) for axis in range(3))
    problem, tiling = launch.problem, launch.tiling
    line = line_of(work, batch, head, position, problem.block_q, tiling.q)
    rows = jnp.arange(out_ref.shape[-1], dtype=jnp.int32)

    def body(kv_start, flags, sums):
        tile = Tile(batch, head, line.start, kv_start, tiling.q, tiling.kv)
        ds = launch.d_logits(inputs, tile, flags)
        index = buckets(inputs.bias, tile)

        def add(bucket, sums):
            total = jnp.sum(jnp.where(index == bucket, ds, 0.0))
            return jnp.where(rows == bucket, sums + total, sums)

        # Far from the diagonal a tile has one bucket, or two.
        return lax.fori_loop(jnp.min(index), jnp.max(index) + 1, add, sums)

    sums = jnp.zeros(rows.shape, jnp.float32)
    sums = over_line(work, line, problem.block_kv, tiling.kv, body, sums)
    out_ref[batch, head, position, :] = sums


def _of_keys(launch: Launch, inputs: Inputs) -> jax.Array:
    """[B or 1, H or 1, 1, K]: a program sums a column of blocks over its queries."""
    batch, heads = inputs.q.shape[:2]
    kv_len = inputs.k.shape[2]
    work = lines(launch.problem, by_row=False)
    grid = heads, batch, kv_len // launch.tiling.kv
    sums = launch(_by_key, grid, (batch, heads, kv_len), work, inputs)
    summed = [axis for axis in (0, 1) if inputs.bias.array.shape[axis] == 1]
    return sums.sum(summed, keepdims=True)[:, :, None]


def _by_key(work: Lines, inputs: Inputs, out_ref, *, launch: Launch) -> None:
    head, batch, position = (pl.program_id(axis) for axis in range(3))
    problem, tiling = launch.problem, launch.tiling
    line = line_of(work, batch, head, position, problem.block_kv, tiling.kv)

    def body(q_start, flags, sums):
        tile = Tile(batch, head, q_start, line.start, tiling.q, tiling.kv, transposed=True)
        return sums + jnp.sum(launch.d_logits(inputs, tile, flags), axis=1)

    sums = jnp.zeros((tiling.kv,), jnp.float32)
    sums = over_line(work, line, problem.block_q, tiling.q, body, sums)
    out_ref[batch, head, pl.ds(line.start, tiling.kv)] = sums


def _of_pairs(launch: Launch, inputs: Inputs) -> jax.Array:
    """[B or 1, H or 1, Q, K]: a program sums one tile over those that share it."""
    problem, tiling = launch.problem, launch.tiling
    shape = inputs.bias.array.shape
    blocks = problem.by_row
    lead = blocks.flags.shape[:2]
    grid_of_blocks = problem.q_len // problem.block_q, problem.kv_len // problem.block_kv
    groups = jnp.indices((*lead, 1))[:2]
    # Entries past a group's end have flags 0 and change nothing.
    table = jnp.zeros((*lead, *grid_of_blocks), jnp.int32)
    table = table.at[(*groups, blocks.rows, blocks.cols)].add(blocks.flags)
    grid = shape[3] // tiling.kv, shape[2] // tiling.q, shape[0] * shape[1]
    return launch(_by_pair, grid, shape, table, inputs)


def _by_pair(table_ref, inputs: Inputs, out_ref, *, launch: Launch) -> None:
    col, row, output = (pl.program_id(axis) for axis in range(3))
    problem, tiling = launch.problem, launch.tiling
    starts = row * tiling.q, col * tiling.kv
    blocks = divide(starts[0], problem.block_q)[0], divide(starts[1], problem.block_kv)[0]
    out_batch, out_head = divide(output, out_ref.shape[1])
    shared_heads = inputs.q.shape[1] // out_ref.shape[1]
    shared = inputs.q.shape[0] // out_ref.shape[0] * shared_heads

    def member(step, total):
        batch, head = divide(step, shared_heads)
        batch, head = out_batch + batch, out_head + head  # one term of each is 0
        tile = Tile(batch, head, *starts, tiling.q, tiling.kv)
        flags = table_ref[(*group_of(table_ref, batch, head), *blocks)]
        return lax.cond(
            (flags & ACTIVE) != 0,
            lambda: total + launch.d_logits(inputs, tile, flags),
            lambda: total,
        )

    total = lax.fori_loop(0, shared, member, jnp.zeros((tiling.q, tiling.kv), jnp.float32))
    out_ref[out_batch, out_head, pl.ds(starts[0], tiling.q), pl.ds(starts[1], tiling.kv)] = total
