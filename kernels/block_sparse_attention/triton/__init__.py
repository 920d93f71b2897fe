"""Block-sparse attention by Pallas for GPUs from Ampere (sm_80) on, through Triton."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.bias import Lowered
from kernels.block_sparse_attention import device
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.triton.backward import gradients
from kernels.block_sparse_attention.triton.bias_gradient import bias_gradient
from kernels.block_sparse_attention.triton.biases import staged_bytes
from kernels.block_sparse_attention.triton.forward import outputs
from kernels.block_sparse_attention.triton.sizes import Tilings, tilings
from kernels.block_sparse_attention.triton.tiles import SMALLEST

__all__ = ["Tilings", "backward", "block_sizes", "forward", "refusal", "tilings"]

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LARGEST_HEAD_DIM = 256
# Offsets into an array are 32-bit up to 2**32 bytes, and signed: bytes are the one type too small.
_LARGEST_PAIR = 2**31


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Blocks of the largest tile; tiles of larger head dims or dtypes are parts of a block."""
    del head_dim, dtype
    return tuple(128 if length > 64 else 64 for length in (q_len, kv_len))


def refusal(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> str | None:
    """Why this backend cannot serve, in a clause; None if it can."""
    del bias
    found = device.capability()
    if found is not None and not device.is_at_least(found, 8):
        return f"a GPU of compute capability {found}; NVIDIA's from 8.0 (Ampere) on are served"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        return f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}; one of bfloat16, float16, float32"
    if q.shape[-1] > _LARGEST_HEAD_DIM:
        return f"head dim {q.shape[-1]} is over {_LARGEST_HEAD_DIM}"
    for block in (problem.block_q, problem.block_kv):
        if block % SMALLEST:
            return f"blocks of {block} slots are no multiple of {SMALLEST}"
    if any(x.size >= _LARGEST_PAIR for x in problem.pair):
        return "a whole array of the mask takes 2 GiB"
    return None


def forward(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """(out [B, H, Q, Dh], lse float32 [B, H, Q]) of q [B, H, Q, Dh] and k, v [B, N, K, Dh]."""
    q, k, v, head_dim = *_widen(q, k, v), q.shape[-1]
    tiling = _tilings(problem, bias, q).forward.fit(problem)
    out, lse = outputs(problem, bias, q, k, v, tiling, interpret=interpret)
    return out[..., :head_dim], lse


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
    """(d_bias, dq, dk, dv); see flash.Backend."""
    del out  # in delta
    q, k, v, d_out, head_dim = *_widen(q, k, v, d_out.astype(q.dtype)), q.shape[-1]
    sizes = _tilings(problem, bias, q)
    arrays = q, k, v, lse, delta, d_out
    pair = sizes.columns.fit(problem), sizes.rows.fit(problem)
    d_arrays = gradients(problem, bias, *arrays, pair, interpret=interpret)
    d_bias = None
    if with_bias_gradient:
        square = sizes.bias.fit_square(problem)
        d_bias = bias_gradient(problem, bias, *arrays, square, interpret=interpret)
    return d_bias, *(x[..., :head_dim] for x in d_arrays)


def _tilings(problem: Problem, bias: Lowered, q: jax.Array) -> Tilings:
    return tilings(q.shape[-1], q.dtype, staged_bytes(bias) + len(problem.pair))


def _widen(*arrays: jax.Array) -> list[jax.Array]:
    """Head dims padded with zeros to a power of two, which Triton's tiles need."""
    head_dim = arrays[0].shape[-1]
    missing = max(SMALLEST, pl.next_power_of_2(head_dim)) - head_dim
    if not missing:
        return list(arrays)
    return [jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) for x in arrays]
