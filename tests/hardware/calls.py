"""Calls of kernels.attention that both kinds of hardware must compile: masks, biases, gradient."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import RelativeBias, masks

# Each takes (B, L)-shaped data of the run: segment ids, which lie in [0, 8).
MASKS: dict[str, Callable[[jax.Array], masks.Mask]] = {
    "causal": lambda ids: masks.Causal(),
    "window and globals": lambda ids: masks.SlidingWindow(256, 256) | masks.GlobalTokens(1),
    "BigBird": lambda ids: masks.BigBird(block_size=128),
    "packed causal": lambda ids: masks.Causal() & masks.Segments(ids, ids),
    "block index": lambda ids: masks.BlockIndex(
        ids[:, None, : ids.shape[1] // 128, None], 128, 128
    ),
}
MORE_MASKS: dict[str, Callable[[jax.Array], masks.Mask]] = {
    "dense": lambda ids: masks.Dense(ids[0, :, None] >= ids[0]),
    "dilated": lambda ids: masks.Dilated(64, 64, 2),
    "vertical slash": lambda ids: masks.VerticalSlash(
        ids[:, None, :4], 128 * ids[:, None, 4:8], 128
    ),
}
BIASES: dict[str, Callable[[jax.Array, jax.Array], RelativeBias | None]] = {
    "none": lambda table, ids: None,
    "T5": lambda table, ids: RelativeBias(table),
    "T5, explicit positions": lambda table, ids: RelativeBias(table, ids, ids),
}

MORE_BIASES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "array of a row": lambda table, ids: table[ids[:1]].transpose(0, 2, 1)[:, :, None],
    "array": lambda table, ids: table[ids[:1, :, None] + ids[:1, None]].transpose(0, 3, 1, 2),
}


def gradients(attend: Callable, mask: str, bias: str) -> Callable:
    """A function of `shapes` that gives the output and all gradients, the bias table's included.

    Args:
      attend: like kernels.attention.
    """

    make_mask, make_bias = (MASKS | MORE_MASKS)[mask], (BIASES | MORE_BIASES)[bias]

    def function(q, k, v, d_out, table, ids):
        def forward(q, k, v, table):
            return attend(q, k, v, make_mask(ids), bias=make_bias(table, ids))

        out, pull = jax.vjp(forward, q, k, v, table)
        return out, pull(d_out)

    return function


def shapes(
    length: int,
    head_dim: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Arguments of `gradients`."""
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), dtype)
    table = jax.ShapeDtypeStruct((32, heads), jnp.float32)
    return q, k, k, q, table, jax.ShapeDtypeStruct((batch, length), jnp.int32)
