"""Block-sparse attention for Hopper: Pallas Mosaic GPU with wgmma, TMA and specialised warpgroups.

Follows FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2): one warpgroup feeds a ring of
buffers, two compute, and while one of them has the tensor core the other has its softmax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_attention.mosaic import compiler
from kernels.block_sparse_attention.mosaic.backward import backward
from kernels.block_sparse_attention.mosaic.forward import forward
from kernels.block_sparse_attention.problem import Problem

__all__ = ["backward", "block_sizes", "forward", "refusal"]

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(problem: Problem, bias: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why these kernels cannot serve, in a clause; None if they can."""
    del v
    if bias is not None:
        return "a bias is not implemented with wgmma"
    if problem.pair:
        return "masks of whole arrays are not implemented with wgmma"
    if q.shape[-1] not in HEAD_DIMS:
        return f"wgmma kernels are written for head dims {HEAD_DIMS}, not {q.shape[-1]}"
    if q.dtype not in DTYPES or q.dtype != k.dtype:
        return f"wgmma kernels are written for bfloat16 and float16, not {q.dtype}"
    blocks = (problem.block_q, problem.block_kv)
    if any(block % 64 for block in blocks):
        return f"blocks of {blocks} slots are no multiples of wgmma's 64 rows"
    if problem.expression.op != "constant" and compiler.miscompiles():
        return "this CUDA's ptxas (12.8.0 to 12.9.0) miscompiles masked wgmma kernels"
    return None


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(block_q, block_kv): 128 slots, fewer where that would mostly be padding."""
    del head_dim, dtype
    return (128 if q_len > 64 else 64, 128 if kv_len > 64 else 64)
