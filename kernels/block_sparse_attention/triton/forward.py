"""Forward kernel: one program a tile of queries and head."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.bias import Lowered
from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import struct
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOWEST
from kernels.block_sparse_attention.triton.biases import KernelBias, for_kernel
from kernels.block_sparse_attention.triton.lists import Lines, lines
from kernels.block_sparse_attention.triton.softmax import logits
from kernels.block_sparse_attention.triton.tiles import (
    Tile,
    Tiling,
    dot,
    exp2_of,
    line_of,
    over_line,
    visible,
)


def outputs(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiling: Tiling,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, H, Q, Dh], lse float32 [B, H, Q]); Dh is a power of two."""
    batch, heads, q_len, _ = q.shape
    estimate = cost.forward(problem, q, k, v)
    kernel = functools.partial(_kernel, problem=problem, tiling=tiling, interpret=interpret)
    call = pl.pallas_call(
        kernel,
        grid=(heads, batch, q_len // tiling.q),
        out_shape=(
            struct(q.shape, q.dtype, q, k, v),
            struct((batch, heads, q_len), jnp.float32, q, k, v),
        ),
        compiler_params=tiling.params,
        cost_estimate=estimate,
        interpret=interpret,
        name="block_sparse_attention_forward",
    )
    return cost.told(call, estimate)(
        lines(problem, by_row=True),
        (problem.query, problem.key, problem.pair),
        for_kernel(bias, q_len, transposed=False),
        q,
        k,
        v,
    )


def _kernel(
    work: Lines,
    operands: Any,
    bias: KernelBias,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    *,
    problem: Problem,
    tiling: Tiling,
    interpret: bool,
) -> None:
    head, batch, position = (pl.program_id(axis) for axis in range(3))
    kv_head = lax.div(head, jnp.int32(q_ref.shape[1] // k_ref.shape[1]))
    line = line_of(work, batch, head, position, problem.block_q, tiling.q)
    queries = pl.ds(line.start, tiling.q)
    q = q_ref[batch, head, queries, :]

    def body(kv_start, flags, carry):
        out, peak, total = carry
        tile = Tile(batch, head, line.start, kv_start, tiling.q, tiling.kv)
        k = k_ref[batch, kv_head, tile.keys, :]
        x, factor, _ = logits(problem, bias, tile, dot(q, k, (1, 1), interpret))
        if flags is not None:
            x = jnp.where(visible(problem, operands, tile, flags), x, -math.inf)
        new_peak = jnp.maximum(peak, jnp.max(x, axis=1) * factor)
        p = exp2_of(x, factor, new_peak[:, None], interpret)
        decay = jnp.exp2(peak - new_peak)
        total = total * decay + jnp.sum(p, axis=1)
        v = v_ref[batch, kv_head, tile.keys, :]
        out = out * decay[:, None] + dot(p.astype(v.dtype), v, (1, 0), interpret)
        return out, new_peak, total

    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((tiling.q,), LOWEST, jnp.float32),
        jnp.zeros((tiling.q,), jnp.float32),
    )
    out, peak, total = over_line(work, line, problem.block_kv, tiling.kv, body, carry)
    saw = total > 0.0
    total = jnp.where(saw, total, 1.0)
    out_ref[batch, head, queries, :] = (out / total[:, None]).astype(out_ref.dtype)
    lse = (peak + jnp.log2(total)) * math.log(2.0)
    lse_ref[batch, head, queries] = jnp.where(saw, lse, -math.inf)
