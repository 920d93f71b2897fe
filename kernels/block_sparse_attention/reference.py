"""The definition, in float32 and in the plainest order: what every backend is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.bias import RelativeBias
from kernels.block_sparse_attention.softmax import LOWEST
from kernels.masks import Mask


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
    group = q.shape[2] // k.shape[2]
    queries = q.astype(jnp.float32)
    keys = jnp.repeat(k.astype(jnp.float32), group, axis=2)
    values = jnp.repeat(v.astype(jnp.float32), group, axis=2)
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", queries, keys, precision="highest")
    if isinstance(bias, RelativeBias):
        bias = bias.dense(q.shape[1], k.shape[1])
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    visible = mask.dense(q.shape[1], k.shape[1]) & (logits > LOWEST)  # [B, H, Q, K]
    any_visible = visible.any(-1, keepdims=True)
    # A row that sees nothing gets finite logits first, so that no NaN enters its gradient.
    logits = jnp.where(visible, logits, jnp.where(any_visible, -jnp.inf, 0.0))
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(logits - log_sum_exp), 0.0)
    output = jnp.einsum("bhqk,bkhd->bqhd", weights, values, precision="highest")
    log_sum_exp = jnp.where(any_visible, log_sum_exp, -jnp.inf)[..., 0]
    return output.astype(q.dtype), jnp.moveaxis(log_sum_exp, 1, 2)
