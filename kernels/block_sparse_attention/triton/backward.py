"""Gradient kernels: dk and dv by columns, dq by rows. Each recomputes the weights of its tiles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.bias import Lowered
from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import struct
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOG2_E
from kernels.block_sparse_attention.triton.biases import KernelBias, for_kernel
from kernels.block_sparse_attention.triton.lists import Lines, lines
from kernels.block_sparse_attention.triton.softmax import weights_and_gradient
from kernels.block_sparse_attention.triton.tiles import (
    Tile,
    Tiling,
    dot,
    line_of,
    over_line,
)


def gradients(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    tilings: tuple[Tiling, Tiling],
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of q's dtype; Dh is a power of two, lse and delta float32 [B, H, Q].

    Two kernels and no atomic additions: sums are taken in one order whatever the machine does.

    Args:
      tilings: of the kernel for dk and dv, and of the one for dq.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    operands = problem.query, problem.key, problem.pair
    arrays = q, k, v, lse * LOG2_E, delta, d_out
    for_columns, for_rows = tilings
    of_columns = cost.d_keys(problem, q, k, v)
    columns = pl.pallas_call(
        functools.partial(_columns, problem=problem, tiling=for_columns, interpret=interpret),
        grid=(kv_heads, batch, kv_len // for_columns.kv),
        out_shape=[struct(k.shape, k.dtype, arrays)] * 2,
        compiler_params=for_columns.params,
        cost_estimate=of_columns,
        interpret=interpret,
        name="block_sparse_attention_dkv",
    )
    d_k, d_v = cost.told(columns, of_columns)(
        lines(problem, by_row=False, heads=heads // kv_heads),
        operands,
        for_kernel(bias, q_len, transposed=True),
        *arrays,
    )
    of_rows = cost.d_queries(problem, q, k, v)
    rows = pl.pallas_call(
        functools.partial(_rows, problem=problem, tiling=for_rows, interpret=interpret),
        grid=(heads, batch, q_len // for_rows.q),
        out_shape=struct(q.shape, q.dtype, arrays),
        compiler_params=for_rows.params,
        cost_estimate=of_rows,
        interpret=interpret,
        name="block_sparse_attention_dq",
    )
    d_q = cost.told(rows, of_rows)(
        lines(problem, by_row=True), operands, for_kernel(bias, q_len, transposed=False), *arrays
    )
    return d_q, d_k, d_v


def _columns(
    work: Lines,
    operands: Any,
    bias: KernelBias,
    q_ref,
    k_ref,
    v_ref,
    log2_sum_ref,
    delta_ref,
    d_out_ref,
    d_k_ref,
    d_v_ref,
    *,
    problem: Problem,
    tiling: Tiling,
    interpret: bool,
) -> None:
    """A tile of keys of one kv head, over the queries of all heads that read it.

    Tiles lie transposed, keys downwards: both products of the sums then take the tile as their
    first factor, which stays in registers.
    """
    kv_head, batch, position = (pl.program_id(axis) for axis in range(3))
    heads = q_ref.shape[1] // k_ref.shape[1]

    def line_of_head(member):
        head = kv_head * heads + member
        return line_of(work, batch, head, position, problem.block_kv, tiling.kv)

    start = line_of_head(0).start  # the same for all heads of a group
    keys = pl.ds(start, tiling.kv)
    k, v = (ref[batch, kv_head, keys, :] for ref in (k_ref, v_ref))

    def one_head(member, carry):
        head = kv_head * heads + member

        def body(q_start, flags, carry):
            d_k, d_v = carry
            tile = Tile(batch, head, q_start, start, tiling.q, tiling.kv, transposed=True)
            q, d_out = (ref[batch, head, tile.queries, :] for ref in (q_ref, d_out_ref))
            p, ds = weights_and_gradient(
                problem,
                operands,
                bias,
                tile,
                flags,
                dot(k, q, (1, 1), interpret),
                dot(v, d_out, (1, 1), interpret),
                log2_sum_ref[batch, head, tile.queries],
                delta_ref[batch, head, tile.queries],
                interpret,
            )
            d_v += dot(p.astype(d_out.dtype), d_out, (1, 0), interpret)
            d_k += dot(ds.astype(q.dtype), q, (1, 0), interpret)
            return d_k, d_v

        return over_line(work, line_of_head(member), problem.block_q, tiling.q, body, carry)

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = one_head(0, carry) if heads == 1 else lax.fori_loop(0, heads, one_head, carry)
    d_k_ref[batch, kv_head, keys, :] = (d_k * problem.scale).astype(d_k_ref.dtype)
    d_v_ref[batch, kv_head, keys, :] = d_v.astype(d_v_ref.dtype)


def _rows(
    work: Lines,
    operands: Any,
    bias: KernelBias,
    q_ref,
    k_ref,
    v_ref,
    log2_sum_ref,
    delta_ref,
    d_out_ref,
    d_q_ref,
    *,
    problem: Problem,
    tiling: Tiling,
    interpret: bool,
) -> None:
    """A tile of queries of one head."""
    head, batch, position = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(head, jnp.int32(q_ref.shape[1] // k_ref.shape[1]))
    line = line_of(work, batch, head, position, problem.block_q, tiling.q)
    queries = pl.ds(line.start, tiling.q)
    q, d_out = (ref[batch, head, queries, :] for ref in (q_ref, d_out_ref))
    log2_sum, delta = (ref[batch, head, queries] for ref in (log2_sum_ref, delta_ref))

    def body(kv_start, flags, d_q):
        tile = Tile(batch, head, line.start, kv_start, tiling.q, tiling.kv)
        k, v = (ref[batch, kv_head, tile.keys, :] for ref in (k_ref, v_ref))
        _, ds = weights_and_gradient(
            problem,
            operands,
            bias,
            tile,
            flags,
            dot(q, k, (1, 1), interpret),
            dot(d_out, v, (1, 1), interpret),
            log2_sum,
            delta,
            interpret,
        )
        return d_q + dot(ds.astype(k.dtype), k, (1, 0), interpret)

    d_q = over_line(work, line, problem.block_kv, tiling.kv, body, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[batch, head, queries, :] = (d_q * problem.scale).astype(d_q_ref.dtype)
