"""Backward: dq by rows of blocks, dk and dv by columns; both recompute p from the log-sum-exp.

Query heads that share a kv head have a program each. They write dk and dv of their own in float32,
8 * B * H * K * Dh bytes in all, so that nothing is rounded before their sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import vary_like
from kernels.block_sparse_attention.mosaic.backward_keys import dkv_kernel
from kernels.block_sparse_attention.mosaic.backward_queries import dq_kernel
from kernels.block_sparse_attention.mosaic.lines import Lines
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOG2_E


def backward(
    problem: Problem,
    bias: None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: Any,
    with_bias_gradient: bool = True,
) -> tuple[None, jax.Array, jax.Array, jax.Array]:
    """The gradients of `forward`.

    Args:
      bias: None.
      q, out, d_out: [B, H, Q, Dh]; k, v: [B, N, K, Dh], bfloat16 or float16.
      lse: float32 [B, H, Q], large and positive where nothing is seen.
      delta: float32 [B, H, Q], what is subtracted from d_out v^T.
      interpret: parameters of Pallas' interpreter of Mosaic GPU, to run in it.
      with_bias_gradient: there is no bias to ask it of.

    Returns:
      (None, dq, dk, dv) in the inputs' shapes and dtypes.
    """
    del bias, out, with_bias_gradient
    operands = [jnp.asarray(x) for x in (*problem.query, *problem.key)]
    inputs = (q, k, v, d_out.astype(q.dtype), lse * LOG2_E, delta, *operands)
    by_row = Lines.arrays(problem.by_row, by_row=True)
    by_col = Lines.arrays(problem.by_col, by_row=False)
    rows = cost.told(dq_kernel(problem, q, k, interpret), cost.d_queries(problem, q, k, v))
    dq = rows(*by_row, *inputs)
    # Registers hold both sums of a block of keys, or one where heads are large.
    together = [("dk", "dv")] if q.shape[-1] <= 128 else [("dk",), ("dv",)]
    products = {("dk", "dv"): 4, ("dk",): 3, ("dv",): 2}
    calls = [
        cost.told(
            dkv_kernel(problem, q, k, interpret, wanted),
            cost.d_keys(problem, q, k, v, products[wanted]),
        )
        for wanted in together
    ]
    dk, dv = (x for call in calls for x in call(*by_col, *inputs))
    return None, *vary_like((dq, _over_group(dk, k), _over_group(dv, v)), *inputs)


def _over_group(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Sums float32 [B, H, K, Dh] over the query heads of each kv head."""
    batch, heads, kv_len, head_dim = gradient.shape
    if heads == like.shape[1]:
        return gradient
    split = gradient.reshape(batch, like.shape[1], -1, kv_len, head_dim)
    return split.sum(2).astype(like.dtype)
