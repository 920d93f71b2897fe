"""Pallas for GPUs: Mosaic GPU's kernels where they can serve, on Hopper; Triton's elsewhere."""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention import device, triton
from kernels.block_sparse_attention.problem import Problem


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """The blocks that both paths like."""
    return triton.block_sizes(q_len, kv_len, head_dim, dtype)


def refusal(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> str | None:
    """Why neither path can serve, in a clause; None if one can."""
    return _path(problem, bias, q, k, v).refusal(problem, bias, q, k, v)


def forward(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See flash.Backend."""
    return _path(problem, bias, q, k, v).forward(problem, bias, q, k, v, interpret=interpret)


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
    interpret: bool,
    with_bias_gradient: bool = True,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See flash.Backend."""
    arguments = problem, bias, q, k, v, out, lse, delta, d_out
    options = {"interpret": interpret, "with_bias_gradient": with_bias_gradient}
    return _path(problem, bias, q, k, v).backward(*arguments, **options)


def _path(problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array) -> ModuleType:
    """The same one for a call's output and for its gradient: it depends on the call alone."""
    if device.capability() == "9.0":
        from kernels.block_sparse_attention import mosaic

        if mosaic.refusal(problem, bias, q, k, v) is None:
            return mosaic
    return triton
