"""Dense masked attention for XLA: the whole [Q, K] product, any mask, any device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.bias import RelativeBias
from kernels.masks import Full, Mask

# Below any real logit, and far enough from the float32 limit that sums stay finite.
_HIDDEN = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    bias: jax.Array | RelativeBias | None,
    scale: float,
    logits_soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See kernels.attention; returns (output [B, Q, H, Dh], log-sum-exp [B, Q, H])."""
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    # Heads come first in every product: on a CPU a batched product whose batch axes do not lead
    # costs 1.5 to 2 times as much, transposes included. Query heads that share a kv head become
    # further query rows of that head, so keys and values are never repeated.
    rows = (batch, kv_heads, heads // kv_heads * q_len, head_dim)
    queries = jnp.swapaxes(q, 1, 2).reshape(rows)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    logits = jnp.einsum("bnqd,bnkd->bnqk", queries, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, q_len, kv_len)
    logits = _biased(logits if scale == 1.0 else logits * scale, bias)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    weights, log_sum_exp = _softmax(logits, mask)
    weights = weights.astype(v.dtype).reshape(*rows[:3], kv_len)
    output = jnp.einsum("bnqk,bnkd->bnqd", weights, values, preferred_element_type=jnp.float32)
    output = output.astype(q.dtype).reshape(batch, heads, q_len, head_dim)
    return jnp.swapaxes(output, 1, 2), jnp.swapaxes(log_sum_exp, 1, 2)


def _softmax(logits: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Weights [B, H, Q, K] over visible keys, log-sum-exp [B, H, Q]; 0 and -inf if there are none.

    The peak carries no gradient: the softmax does not depend on it.
    """
    visible = None if isinstance(mask, Full) else mask.dense(*logits.shape[2:])[:, None]
    if visible is not None:
        logits = jnp.where(visible, logits, _HIDDEN)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    log_sum_exp = jnp.where(sees, peak + jnp.log(total), -jnp.inf)
    return weights / total, log_sum_exp[..., 0]


def _biased(logits: jax.Array, bias: jax.Array | RelativeBias | None) -> jax.Array:
    """logits [B, H, Q, K] plus bias."""
    if isinstance(bias, RelativeBias):
        bias = bias.dense(*logits.shape[2:])
    if bias is None:
        return logits
    bias = bias.astype(logits.dtype)
    if bias.shape[0] != 1 or logits.shape[0] == 1:
        return logits + bias
    return _add_to_every_row(logits, jnp.broadcast_to(bias, (1, *logits.shape[1:])))


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
