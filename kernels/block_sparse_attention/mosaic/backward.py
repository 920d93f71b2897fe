"""Backward: dq by rows of blocks, dk and dv by columns; both recompute p from the log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.block_sparse_attention.mosaic.backward_keys import dkv_kernel
from kernels.block_sparse_attention.mosaic.backward_queries import dq_kernel
from kernels.block_sparse_attention.mosaic.lines import Lines
from kernels.block_sparse_attention.mosaic.tiles import LOG2E
from kernels.block_sparse_attention.problem import Problem


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
    interpret: bool,
) -> tuple[None, jax.Array, jax.Array, jax.Array]:
    """The gradients of `forward`.

    Args:
      bias: None.
      q, out, d_out: [B, H, Q, Dh]; k, v: [B, N, K, Dh], bfloat16 or float16.
      lse: float32 [B, H, Q], large and positive where nothing is seen.
      delta: float32 [B, H, Q], what is subtracted from d_out v^T.
      interpret: run in Pallas' interpreter of Mosaic GPU.

    Returns:
      (None, dq, dk, dv) in the inputs' shapes and dtypes.
    """
    del bias, out
    operands = [jnp.asarray(x) for x in (*problem.query, *problem.key)]
    inputs = (q, k, v, d_out.astype(q.dtype), lse * LOG2E, delta, *operands)
    by_row = Lines.arrays(problem.by_row, by_row=True)
    by_col = Lines.arrays(problem.by_col, by_row=False)
    dq = dq_kernel(problem, q, k, interpret)(*by_row, *inputs)
    # Registers hold both sums of a block of keys, or one where heads are large.
    together = [("dk", "dv")] if q.shape[-1] <= 128 else [("dk",), ("dv",)]
    calls = [dkv_kernel(problem, q, k, interpret, wanted) for wanted in together]
    dk, dv = (x for call in calls for x in call(*by_col, *inputs))
    return None, dq, _over_group(dk, k), _over_group(dv, v)


def _over_group(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Sums [B, H, K, Dh] over the query heads of each kv head."""
    batch, heads, kv_len, head_dim = gradient.shape
    if heads == like.shape[1]:
        return gradient
    split = gradient.reshape(batch, like.shape[1], -1, kv_len, head_dim)
    return split.sum(2, dtype=jnp.float32).astype(like.dtype)
