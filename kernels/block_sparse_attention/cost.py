"""What a kernel computes and moves, for XLA, which sees nothing inside kernels.

Where lists of blocks are dynamic their capacity is counted: the most blocks that may be active as
far as the host knows, which for a packed causal row is the whole triangle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl

from kernels.block_sparse_attention.problem import ACTIVE, Blocks, Problem

FLOPS_SCOPE = "block_sparse_attention_flops_"


def forward(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> pl.CostEstimate:
    """Of q k^T and p v over rows; q [B, H, Q, Dh], k and v [B, N, K, Dh]."""
    return _over(problem.by_row, problem, 2, q, kept=(q, q), read=(k, v))


def d_queries(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> pl.CostEstimate:
    """Of q k^T, d_out v^T and ds k over rows."""
    return _over(problem.by_row, problem, 3, q, kept=(q, q, q), read=(k, v))


def d_keys(
    problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, products: int = 4
) -> pl.CostEstimate:
    """Of k q^T, v d_out^T, ds^T q and p^T d_out over columns, or of some of them."""
    return _over(problem.by_col, problem, products, q, kept=(k, v, k, v), read=(q, q))


def d_bias(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> pl.CostEstimate:
    """Of q k^T and d_out v^T once more, where a kernel of its own makes the bias's gradient."""
    return _over(problem.by_row, problem, 2, q, kept=(q, q), read=(k, v))


def _over(
    blocks: Blocks,
    problem: Problem,
    products: int,
    q: jax.Array,
    *,
    kept: Sequence[jax.Array],
    read: Sequence[jax.Array],
) -> pl.CostEstimate:
    """Of a kernel over a list of blocks.

    Args:
      products: of a block's queries, keys and head size.
      kept: arrays like those that are read or written once.
      read: arrays of which each entry reads a block, [B, H or N, L, Dh].
    """
    batch, heads, _, head_dim = q.shape
    entries = most_active(blocks, batch, heads)
    pairs = entries * problem.block_q * problem.block_kv
    slots = problem.block_q if blocks is problem.by_col else problem.block_kv
    return pl.CostEstimate(
        flops=2 * products * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in kept)
        + entries * slots * head_dim * sum(x.dtype.itemsize for x in read),
    )


def most_active(blocks: Blocks, batch: int, heads: int) -> int:
    """Active blocks of all heads, or of a dynamic list the most that there may be."""
    lead, size = blocks.rows.shape[:2], blocks.rows.shape[-1]
    count = int(np.sum(blocks.flags & ACTIVE != 0)) if blocks.is_static else math.prod(lead) * size
    return count * (batch * heads) // math.prod(lead)


def told(call: Callable[..., Any], estimate: pl.CostEstimate) -> Callable[..., Any]:
    """`call` of a GPU kernel, which carries no estimate in a compiled program: its op_name has the
    FLOPs, after FLOPS_SCOPE."""
    return jax.named_scope(f"{FLOPS_SCOPE}{estimate.flops}")(call)
