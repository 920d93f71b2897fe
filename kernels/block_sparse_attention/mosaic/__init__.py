"""Block-sparse attention for Hopper: Pallas Mosaic GPU with wgmma, TMA and specialised warpgroups.

Follows FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2): one warpgroup feeds a ring of
buffers, two compute, and while one of them has the tensor core the other has its softmax.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_attention.mosaic.backward import backward
from kernels.block_sparse_attention.mosaic.forward import forward
from kernels.block_sparse_attention.problem import Problem

__all__ = ["backward", "block_sizes", "forward", "refusal"]

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float16)
# ptxas of CUDA 12.8.0 up to 12.9.1 (release 86 of 12.9) miscompiles masked steps; jax's own
# attention_mgpu refuses causal attention there too.
MISCOMPILES = ((12, 8, 0), (12, 9, 86))


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
    if problem.expression.op != "constant" and _miscompiles(_compiler()):
        return "this CUDA's ptxas (12.8.0 to 12.9.0) miscompiles masked wgmma kernels"
    return None


def block_sizes(q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """(block_q, block_kv): 128 slots, fewer where that would mostly be padding."""
    del head_dim, dtype
    return (128 if q_len > 64 else 64, 128 if kv_len > 64 else 64)


def _miscompiles(version: tuple[int, ...] | None) -> bool:
    return version is not None and MISCOMPILES[0] <= version < MISCOMPILES[1]


@functools.cache
def _compiler() -> tuple[int, ...] | None:
    """The version of the ptxas that Mosaic GPU will call; None if there is none to be found.

    The plugin then assembles by itself, in jax 0.10.2 as CUDA 12.9.1 does.
    """
    root = os.environ.get("MOSAIC_GPU_CUDA_ROOT", "/usr/local/cuda")
    try:
        command = [pathlib.Path(root) / "bin" / "ptxas", "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(x) for x in found.groups()) if found else None
