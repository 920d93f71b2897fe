"""Attention in plain XLA: any device, any mask, any bias; nothing is read of inactive blocks.

A call that is one block, as short rows and decoding steps are, is a dense masked product that JAX
differentiates (dense.py). Any other walks the active blocks of each row of blocks, a strip of them
at a time (strips.py): a strip's logits stay in a core's cache, so that on a CPU the walk beats the
dense product even where every block is active.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.xla import backward as backward_, dense, forward as forward_

# Up to here, in logits a head, one block is as fast as a walk, and its gradient needs no second
# computation of the logits.
ONE_BLOCK = 256 * 256
BLOCK = 128


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """One block if that is small; else the nearest to 128 that wastes little on padding."""
    del head_dim, dtype
    if is_one_block(q_len, kv_len):
        return q_len, kv_len
    return _even(q_len), _even(kv_len)


def is_one_block(q_len: int, kv_len: int) -> bool:
    """Whether one dense product is best, as it is for short rows and decoding steps."""
    return q_len * kv_len <= ONE_BLOCK or q_len == 1


def _even(length: int) -> int:
    size = -(-length // -(-length // BLOCK))
    return -(-size // 8) * 8


def refusal(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> str | None:
    """It serves every call."""
    del problem, bias, q, k, v
    return None


def differentiates_itself(problem: Problem) -> bool:
    """Whether `attention` serves, through JAX's own differentiation."""
    return (problem.block_q, problem.block_kv) == (problem.q_len, problem.kv_len)


def attention(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`forward` of a problem of one block; its gradient is JAX's own and keeps the weights."""
    return dense.attention(problem, bias, q, k, v)


def forward(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See flash.Backend."""
    del interpret
    one_block = differentiates_itself(problem)
    return (dense.attention if one_block else forward_.forward)(problem, bias, q, k, v)


def backward(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
    with_bias_gradient: bool = True,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See flash.Backend."""
    del out, interpret
    arrays = q, k, v, lse, delta, d_out
    return backward_.backward(problem, bias, *arrays, with_bias_gradient=with_bias_gradient)
