"""A problem of one block: the whole [Q, K] product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bias import Array, Buckets, Distances, Lowered, shifted_rows
from kernels.block_sparse_attention.manual import varying_alike
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL, Problem
from kernels.block_sparse_attention.softmax import LOWEST
from kernels.block_sparse_attention.xla.windows import tile

# No peak is lower: the weight exp(logit - peak) of what is hidden, by the mask or by its own logit,
# is then exactly 0 even in a row that sees nothing.
_LOWEST_PEAK = LOWEST / 2


def attention(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See flash.Backend.forward; JAX differentiates it."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    # Heads come first in every product: on a CPU a batched product whose batch axes do not lead
    # costs 1.5 to 2 times as much, transposes included. Query heads that share a kv head become
    # further query rows of that head, so keys and values are never repeated.
    rows = (batch, kv_heads, heads // kv_heads * q_len)
    queries = q.reshape(*rows, head_dim)
    logits = jnp.einsum("bnqd,bnkd->bnqk", queries, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, q_len, kv_len)
    logits = _biased(logits if problem.scale == 1.0 else logits * problem.scale, bias)
    if problem.soft_cap is not None:
        logits = problem.soft_cap * jnp.tanh(logits / problem.soft_cap)
    weights, log_sum_exp = _softmax(logits, visible(problem))
    weights = weights.astype(v.dtype).reshape(*rows, kv_len)
    output = jnp.einsum("bnqk,bnkd->bnqd", weights, v, preferred_element_type=jnp.float32)
    return output.astype(q.dtype).reshape(q.shape), log_sum_exp


def visible(problem: Problem) -> jax.Array | None:
    """Who sees whom, bool [B or 1, H or 1, Q, K]; None where everyone sees everyone."""
    lists = problem.by_row
    flags = lists.flags[..., :1, None]  # [Gb, Gh, 1, 1]
    if isinstance(flags, np.ndarray) and np.all(flags & (ACTIVE | PARTIAL) == ACTIVE):
        return None
    seen = tile(
        problem,
        np.arange(problem.q_len, dtype=np.int32),
        np.arange(problem.kv_len, dtype=np.int32),
        [x[..., None] for x in problem.query],
        [x[..., None, :] for x in problem.key],
        list(problem.pair),
        flags,
    )
    return (flags & ACTIVE > 0) & ((flags & PARTIAL == 0) | seen)


def _softmax(logits: jax.Array, visible: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Weights [B, H, Q, K] over visible keys, log-sum-exp [B, H, Q]; 0 and -inf if there are none.

    The peak carries no gradient: the softmax does not depend on it.
    """
    if visible is not None:
        logits = jnp.where(visible, logits, LOWEST)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=_LOWEST_PEAK))
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    log_sum_exp = jnp.where(sees, peak + jnp.log(total), -jnp.inf)
    return weights / total, log_sum_exp[..., 0]


def _biased(logits: jax.Array, bias: Lowered) -> jax.Array:
    """logits [B, H, Q, K] plus bias."""
    if bias is None:
        return logits
    array = _written_out(bias, logits.shape[2]).astype(logits.dtype)
    if array.shape[0] != 1 or logits.shape[0] == 1:
        return logits + array
    array = jnp.broadcast_to(array, (1, *logits.shape[1:]))
    return _add_to_every_row(*varying_alike(logits, array))


def _written_out(bias: Distances | Buckets | Array, q_len: int) -> jax.Array:
    """[B or 1, H or 1, Q or 1, K]."""
    if isinstance(bias, Array):
        return bias.array
    if isinstance(bias, Buckets):
        distance = bias.kv_positions[:, None, :] - bias.q_positions[:, :, None]
        return jnp.moveaxis(bias.table[bias.index(distance)], -1, 1)
    values = jnp.roll(bias.values, -q_len, 1)
    return shifted_rows(values, q_len)[None, ..., : values.shape[1] - q_len]


@jax.custom_vjp
def _add_to_every_row(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """logits [B, H, Q, K] + bias [1, H, Q, K].

    The bias's gradient is a sum over B. XLA's CPU reduction over a leading axis strides through
    memory and costs as much as the rest of attention; a product with ones costs a fiftieth.
    """
    return logits + bias


def _add_forward(logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return logits + bias, None


def _add_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = gradient.reshape(gradient.shape[0], -1)
    ones = jnp.ones((1, gradient.shape[0]), gradient.dtype)
    total = jnp.dot(ones, flat, precision="highest")
    return gradient, total.reshape(1, *gradient.shape[1:])


_add_to_every_row.defvjp(_add_forward, _add_backward)
