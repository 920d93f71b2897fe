"""The gradient of a written-out bias that heads, or rows of the batch, share.

Those that share it are computed one after another and add to one array in place, so that the
gradient takes the memory of the bias and not that of every head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import bias as kinds
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.tpu.parts import taken


def sharers(bias: kinds.Lowered, batch: int, heads: int) -> tuple[int, int]:
    """Rows of the batch and heads that share each [Q, K] of a bias: (1, 1) where none do, and for
    biases whose gradient is no [Q, K] array."""
    if not isinstance(bias, kinds.Array) or bias.array.shape[2] == 1:
        return 1, 1
    lead = bias.array.shape
    return batch if lead[0] == 1 else 1, heads if lead[1] == 1 else 1


def added_up(
    call: Callable[..., tuple[jax.Array, jax.Array]],
    problem: Problem,
    bias: kinds.Array,
    total: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(total, dq) of call(problem, bias, total, *arrays), by those that share the bias.

    Args:
      call: returns the total with this call's gradient added, and dq of its rows and heads.
      total: float32, of the gradient.
      arrays: [B, H or N, ...], queries first.
    """
    batch, heads = arrays[0].shape[:2]
    counts = sharers(bias, batch, heads)

    def one(total: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = index // counts[1], index % counts[1]

        def take(x: jax.Array) -> jax.Array:
            x = jnp.asarray(x)
            for axis, (place, count) in enumerate(zip(places, counts, strict=True)):
                if count > 1 and x.shape[axis] > 1:
                    # Of N kv heads, the one that this query head reads.
                    start = place * x.shape[axis] // count
                    x = jax.lax.dynamic_slice_in_dim(x, start, 1, axis)
            return x

        part = dataclasses.replace(bias, array=take(bias.array))
        return call(taken(problem, take), part, total, *map(take, arrays))

    total, dq = jax.lax.scan(one, total, jnp.arange(counts[0] * counts[1]))
    dq = dq.reshape(*counts, *dq.shape[1:]).swapaxes(1, 2)
    return total, dq.reshape(arrays[0].shape)
