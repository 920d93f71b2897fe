"""Gradient over active blocks: weights again from the log-sum-exp, all gradients in one walk."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.xla.logits import (
    add_gradient,
    close_gradient,
    logits,
    no_gradient,
    open_gradient,
    ready,
    scaled,
)
from kernels.block_sparse_attention.xla.strips import Strip, Walk
from kernels.block_sparse_attention.xla.windows import zero_of


def backward(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    with_bias_gradient: bool,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See flash.Backend."""
    scale = problem.scale
    problem, q = scaled(problem, q)
    walk = Walk.of(problem, bias, q, k)
    zero = zero_of(problem, bias, q, k, v, lse, delta, d_out)
    kv_len = k.shape[2]
    k, v = walk.padded(k), walk.padded(v)

    def of_heads(head: jax.Array, state: Any) -> Any:
        d_bias, *gradients = state
        bias_here = ready(walk, bias, head)

        def step(strip: Strip, state: Any) -> Any:
            part, dq, dk, dv = state
            rows = [walk.queries(x, strip) for x in (q, lse, delta, d_out)]
            d_logits, *more = _strip(walk, bias_here, strip, *rows, k, v)
            more_q = walk.queries(dq, strip) + more[0]
            return (
                add_gradient(walk, bias_here, strip, part, d_logits),
                walk.put_queries(dq, strip, more_q),
                walk.add_keys(dk, strip, more[1]),
                walk.add_keys(dv, strip, more[2]),
            )

        part = open_gradient(bias_here, d_bias)
        part, *gradients = walk.strips(head, step, (part, *gradients))
        return close_gradient(bias_here, d_bias, part, head), *gradients

    # Of dk and dv the slots come last: so the larger factor of their products is not transposed,
    # which takes XLA's CPU products 1.8 times as long.
    kv_shape = *k.shape[:2], k.shape[3], k.shape[2]
    shapes = q.shape, kv_shape, kv_shape
    d_values = no_gradient(bias) if with_bias_gradient else None
    start = d_values, *(jnp.zeros(shape, jnp.float32) for shape in shapes)
    state = walk.heads_in_turn(of_heads, jax.tree.map(lambda x: x + zero, start))
    d_values, dq, dk, dv = state
    d_bias = None
    if d_values is not None:
        leaves, tree = jax.tree.flatten(bias)
        d_bias = jax.tree.unflatten(tree, [d_values, *leaves[1:]])
    # Queries that were scaled beforehand have scaled dk already.
    dq, dk = dq * scale, dk * problem.scale
    dk, dv = (jnp.swapaxes(x[..., :kv_len], 2, 3).astype(k.dtype) for x in (dk, dv))
    return d_bias, dq.astype(q.dtype), dk, dv


def _strip(
    walk: Walk,
    bias: Any,
    strip: Strip,
    q: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of a strip's logits before the scale [b, h, block_q, w], and what they add to dq
    (still without the scale), dk (likewise) and dv, the last two [b, n, Dh, w]."""
    keys, values = walk.keys(k, strip), walk.keys(v, strip)
    scores, slope = logits(walk, bias, strip, q, keys)
    visible = walk.visible(strip)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - lse[..., None])
    rows, d_rows = walk.by_kv_head(q), walk.by_kv_head(d_out)
    d_weights = _product("bnqd,bnkd->bnqk", d_rows, values)
    d_logits = weights * (walk.by_head(d_weights) - delta[..., None])
    if slope is not None:
        d_logits = d_logits * slope
    weights, narrow = (walk.by_kv_head(x).astype(k.dtype) for x in (weights, d_logits))
    dq = walk.by_head(_product("bnqk,bnkd->bnqd", narrow, keys))
    dk = _product("bnqd,bnqk->bndk", rows, narrow)
    dv = _product("bnqd,bnqk->bndk", d_rows, weights)
    return d_logits, dq, dk, dv


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
