"""Whether the arrays of a call fit each other; asked before a backend is chosen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bias import RelativeBias
from kernels.masks import Builder, Mask

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError or TypeError unless q [B, Q, H, Dh] and k, v [B, K, N, Dh] are floats."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention wants q [B, Q, H, Dh] and k, v [B, K, N, Dh]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention wants one batch size and one head size; got {shapes}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention wants a multiple of k's heads in q; got {shapes}")
    if any(x.dtype not in DTYPES for x in (q, k, v)):
        raise TypeError(
            "attention computes in float32, of float32, bfloat16 or float16; "
            f"got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )


def check_sizes(block_sizes: Any) -> None:
    """Raises ValueError unless block_sizes is None or two positive integers."""
    if block_sizes is None:
        return
    is_pair = isinstance(block_sizes, tuple | list) and len(block_sizes) == 2
    if not is_pair or not all(isinstance(x, int | np.integer) and x > 0 for x in block_sizes):
        raise ValueError(f"block_sizes are two positive integers; got {block_sizes!r}")


def check_mask(mask: Any, q: jax.Array, k: jax.Array) -> None:
    """Raises TypeError unless mask is one, ValueError unless its arrays fit q and k."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"attention's mask is a {type(mask).__name__}; wrap an array in masks.Dense(array), "
            "True where a query sees a key"
        )

    def check() -> None:
        build = Builder(q.shape[1], k.shape[1])
        mask.expression(build)
        patterns = [atom.pattern for atom in build.atoms]
        for x in (*build.queries, *build.keys, *build.pairs, *patterns):
            _check_lead("a mask", x.shape, q)

    jax.eval_shape(check)  # nothing is computed


def check_bias(bias: jax.Array | RelativeBias | None, q: jax.Array, k: jax.Array) -> None:
    """Raises ValueError unless the bias fits q [B, Q, H, Dh] and k [B, K, N, Dh]."""
    batch, q_len, heads = q.shape[:3]
    kv_len = k.shape[1]
    if bias is None:
        return
    if not isinstance(bias, RelativeBias):
        wanted = ((1, batch), (1, heads), (1, q_len), (kv_len,))
        if len(bias.shape) != 4 or any(
            n not in sizes for n, sizes in zip(bias.shape, wanted, strict=True)
        ):
            raise ValueError(
                f"a bias is [{batch} or 1, {heads} or 1, {q_len} or 1, {kv_len}] for q {q.shape} "
                f"and k {k.shape}; got {bias.shape}"
            )
        return
    if len(bias.table.shape) != 2 or bias.table.shape[1] != heads:
        raise ValueError(
            f"a RelativeBias has a table [num_buckets, {heads}] for q {q.shape}; "
            f"got {bias.table.shape}"
        )
    for name, length in (("q_positions", q_len), ("kv_positions", kv_len)):
        positions = getattr(bias, name)
        shapes = (1, length), (batch, length)
        if positions is not None and tuple(positions.shape) not in shapes:
            raise ValueError(
                f"a RelativeBias has {name} [{batch} or 1, {length}] for q {q.shape} and k "
                f"{k.shape}; got {positions.shape}"
            )


def _check_lead(name: str, shape: tuple[int, ...], q: jax.Array) -> None:
    """Raises ValueError unless shape starts with [B or 1, H or 1]."""
    for axis, wanted, what in ((0, q.shape[0], "batch rows"), (1, q.shape[2], "heads")):
        if shape[axis] not in (1, wanted):
            raise ValueError(
                f"{name} has values for {shape[axis]} {what} where q has {wanted}: "
                f"{tuple(shape)} for q {q.shape}"
            )
