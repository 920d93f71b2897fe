"""Forward over active blocks, with an online softmax (Milakov & Gimelshein 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOWEST
from kernels.block_sparse_attention.xla.logits import Ready, logits, ready, scaled
from kernels.block_sparse_attention.xla.strips import Strip, Walk
from kernels.block_sparse_attention.xla.windows import zero_of

# The peak before any key is seen: finite and above all that is hidden, by the mask or by its own
# logit, so that the weight exp(logit - peak) of that is exactly 0.
_NO_PEAK = LOWEST / 2

# out [B, H, Q, Dh] and lse [B, H, Q]; then, float32 and of the current row of blocks, its sum of
# weighted values [b, h, block_q, Dh], peak and sum of weights [b, h, block_q].
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def forward(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See flash.Backend."""
    problem, q = scaled(problem, q)
    walk = Walk.of(problem, bias, q, k)
    zero = zero_of(problem, bias, q, k, v)
    k, v = walk.padded(k), walk.padded(v)

    def of_heads(head: jax.Array, state: _State) -> _State:
        bias_here = ready(walk, bias, head)

        def step(strip: Strip, state: _State) -> _State:
            return _merged(walk, bias_here, strip, q, k, v, state)

        return walk.strips(head, step, state)

    row = walk.batch, walk.heads, problem.block_q
    start = (
        jnp.zeros(q.shape, q.dtype) + zero.astype(q.dtype),
        jnp.zeros(q.shape[:3], jnp.float32) + zero,
        *(jnp.zeros(shape, jnp.float32) + zero for shape in ((*row, q.shape[3]), row, row)),
    )
    return walk.heads_in_turn(of_heads, start)[:2]


def _merged(
    walk: Walk,
    bias: Ready,
    strip: Strip,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: _State,
) -> _State:
    """The state after one more strip. Each writes the row's result so far: the last one stays."""
    out, lse, products, peak, total = state
    values, _ = logits(walk, bias, strip, walk.queries(q, strip), walk.keys(k, strip))
    visible = walk.visible(strip)
    if visible is not None:
        values = jnp.where(visible, values, -jnp.inf)
    old_peak = jnp.where(strip.is_first, _NO_PEAK, peak)
    peak = jnp.maximum(old_peak, values.max(-1))
    weights = jnp.exp(values - peak[..., None])
    decay = jnp.exp(old_peak - peak)
    total = jnp.where(strip.is_first, 0.0, total) * decay + weights.sum(-1)
    more = jnp.einsum(
        "bnqk,bnkd->bnqd",
        walk.by_kv_head(weights).astype(v.dtype),
        walk.keys(v, strip),
        preferred_element_type=jnp.float32,
    )
    products = jnp.where(strip.is_first, 0.0, products) * decay[..., None] + walk.by_head(more)
    sees = total > 0
    divisor = jnp.where(sees, total, 1.0)
    out = walk.put_queries(out, strip, (products / divisor[..., None]).astype(out.dtype))
    lse = walk.put_queries(lse, strip, jnp.where(sees, peak + jnp.log(divisor), -jnp.inf))
    return out, lse, products, peak, total
