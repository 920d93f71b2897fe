"""Pallas for GPUs: Mosaic GPU's kernels where they can serve, on Hopper; Triton's elsewhere."""

from __future__ import annotations

import re
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention import triton
from kernels.block_sparse_attention.problem import Problem

_HOPPER = re.compile(r"\bG?H\d{2,3}\b")  # H100, H200, H800, H20, GH200


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
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See flash.Backend."""
    arguments = problem, bias, q, k, v, out, lse, delta, d_out
    return _path(problem, bias, q, k, v).backward(*arguments, interpret=interpret)


def _path(problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array) -> ModuleType:
    """The same one for a call's output and for its gradient: it depends on the call alone."""
    if _HOPPER.search(_device_kind()):
        from kernels.block_sparse_attention import mosaic

        if mosaic.refusal(problem, bias, q, k, v) is None:
            return mosaic
    return triton


def _device_kind() -> str:
    """Such as "NVIDIA H100 80GB HBM3", of the mesh in force or of the first GPU; else ""."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    try:
        return jax.local_devices(backend="gpu")[0].device_kind
    except RuntimeError:
        return ""
