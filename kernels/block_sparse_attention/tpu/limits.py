"""What the kernels can serve, and the blocks they like."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.tpu.parts import MAX_LIST_BYTES, heads_at_once
from kernels.block_sparse_attention.tpu.steps import MAX_LINES, list_bytes


def refusal(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> str | None:
    """Why these kernels cannot serve, in a clause; None if they can."""
    del bias
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        return f"dtypes {sorted(dtypes)} are not all bfloat16 or all float32"
    if not 32 <= q.shape[-1] <= 256:
        return f"a head size of {q.shape[-1]} is not in 32 to 256"
    lines = max(problem.by_row.num_lines, problem.by_col.num_lines)
    if lines > MAX_LINES:
        return f"{lines} blocks a row are more than {MAX_LINES}"
    if heads_at_once(problem, k.shape[1]) is None:
        return (
            f"a list of {list_bytes(problem)} bytes of active blocks does not fit the "
            f"{MAX_LIST_BYTES} bytes of scalar memory; larger blocks are fewer"
        )
    return None


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Blocks of 512 slots, less for short rows, in multiples of 128."""
    del head_dim, dtype
    q, kv = (min(512, -(-n // 128) * 128) for n in (q_len, kv_len))
    return q, kv
