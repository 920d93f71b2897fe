"""Parts of arrays at traced places."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.problem import Problem


def tile(
    problem: Problem,
    q_slot: jax.Array,
    kv_slot: jax.Array,
    query: list[jax.Array],
    key: list[jax.Array],
    pair: list[jax.Array],
    flags: jax.Array,
) -> jax.Array:
    """problem.tile of slots [q] and [w], and of the rest with two leading axes."""
    lead = jnp.broadcast_shapes((1, 1), *(x.shape[:-2] for x in (*query, *key, *pair, flags)))
    q_slot = jnp.broadcast_to(q_slot[:, None], (*lead, q_slot.size, 1))
    return problem.tile(q_slot, kv_slot[None], query, key, pair, flags)


def window(x: jax.Array, start: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Part of x, by its leading axes; an axis of length 1 stands for any place on it."""
    sizes = [min(size, n) for size, n in zip(sizes, x.shape, strict=False)]
    return jax.lax.dynamic_slice(x, start_of(x, start), [*sizes, *x.shape[len(sizes) :]])


def added(x: jax.Array, start: tuple[jax.Array, ...], more: jax.Array) -> jax.Array:
    """x with more added at a window of more's shape."""
    start = start_of(x, start)
    old = jax.lax.dynamic_slice(x, start, more.shape)
    return jax.lax.dynamic_update_slice(x, old + more, start)


def joined(parts: list[jax.Array], axis: int = 0) -> jax.Array:
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def zero_of(*trees: Any) -> jax.Array:
    """A float32 0 that varies over a mesh's manual axes wherever any leaf does, as the state of a
    loop over them must from the start."""
    zero = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(trees):
        first = jax.lax.stop_gradient(jnp.asarray(leaf)[(0,) * leaf.ndim])
        zero = jnp.where(False, first.astype(jnp.float32), zero)
    return zero


def start_of(x: jax.Array, start: tuple[jax.Array | int, ...]) -> list[jax.Array | np.int32]:
    """int32 all, as slices want it where Python's integers would be of 64 bits."""
    start = [0 if n == 1 else s for n, s in zip(x.shape, start, strict=False)]
    start = [*start, *[0] * (x.ndim - len(start))]
    return [np.int32(s) if isinstance(s, int) else s for s in start]
