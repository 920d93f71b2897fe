"""Token cross-entropy with z-loss and label smoothing, as global sums and weights."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Normalisation = Literal["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]


class TokenLoss(NamedTuple):
    """Sums over the tokens of a batch, float32; divide by `weight_sum` for means.

    Scalars, or [G] for G sets of weights.

    Attributes:
      loss_sum: weighted cross-entropy in nats, without the z-loss.
      z_loss_sum: weighted `z_loss * log(Z)**2`, to be added to `loss_sum`.
      correct_sum: weighted count of tokens whose largest logit is the target.
      weight_sum: sum of the weights.
    """

    loss_sum: jax.Array
    z_loss_sum: jax.Array
    correct_sum: jax.Array
    weight_sum: jax.Array


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Weighted cross-entropy of integer targets, computed in float32.

    Label smoothing gives the target `1 - label_smoothing` and shares the rest equally among the
    other classes; the entropy of that distribution is subtracted, so a perfect prediction costs
    0 (the convention of T5X). The z-loss keeps log(Z) near 0 (Chowdhery et al. 2022, "PaLM",
    section 5; first in Mesh TensorFlow).

    Args:
      logits: [..., V], any float dtype; the backward pass keeps them and log(Z), no softmax.
      targets: int [...], in [0, V); a target outside gives NaN.
      weights: float [...], or [G, ...] for G sums at once, which share one pass.
      z_loss: coefficient of log(Z)**2.
      label_smoothing: in [0, 1).
    """
    weights = weights.astype(jnp.float32)
    loss, log_z = _token_loss(logits, targets, label_smoothing)
    correct = _first_largest(jax.lax.stop_gradient(logits), targets)
    tokens = tuple(range(-targets.ndim, 0))
    return TokenLoss(
        loss_sum=jnp.sum(loss * weights, tokens),
        z_loss_sum=z_loss * jnp.sum(jnp.square(log_z) * weights, tokens),
        correct_sum=jnp.sum(correct * weights, tokens),
        weight_sum=jnp.sum(weights, tokens),
    )


def _first_largest(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """bool [...]: `argmax(logits, -1) == targets`, at a fraction of argmax's price on CPUs."""
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    before = classes < targets[..., None]  # argmax gives ties to the first
    beaten = jnp.where(before, logits >= target_logit, logits > target_logit)
    return ~jnp.any(beaten, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _token_loss(
    logits: jax.Array, targets: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """logits [..., V], targets [...] -> (cross-entropy, log Z), float32 [...]."""
    logits = logits.astype(jnp.float32)
    low, high, entropy = _smoothed(label_smoothing, logits.shape[-1])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (high - low) * target_logit - entropy
    if label_smoothing:
        loss = loss - low * jnp.sum(logits, axis=-1)
    return loss, log_z


def _token_loss_forward(logits, targets, label_smoothing):
    loss, log_z = _token_loss(logits, targets, label_smoothing)
    # The logits are alive anyway; saving log Z alone spares a second [..., V] residual.
    return (loss, log_z), (logits, targets, log_z)


def _token_loss_backward(label_smoothing, residuals, cotangents):
    logits, targets, log_z = residuals
    d_loss, d_log_z = (c[..., None] for c in cotangents)
    low, high, _ = _smoothed(label_smoothing, logits.shape[-1])
    softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    # A comparison inside one fused elementwise pass: no one-hot array is written.
    wanted = jnp.where(classes == targets[..., None], high, low)
    gradient = (d_loss + d_log_z) * softmax - d_loss * wanted
    return gradient.astype(logits.dtype), None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _smoothed(label_smoothing: float, num_classes: int) -> tuple[float, float, float]:
    """(probability of another class, of the target, entropy of the smoothed distribution)."""
    if not label_smoothing:
        return 0.0, 1.0, 0.0
    high = 1.0 - label_smoothing
    low = label_smoothing / (num_classes - 1)
    entropy = -(high * math.log(high) + label_smoothing * math.log(low))
    return low, high, entropy


def normalise_loss(
    mode: Normalisation, weights: jax.Array, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What to divide a loss sum by, and the weights that go with it (modes of T5X's losses).

    Args:
      mode: NUM_REAL_TARGET_TOKENS divides by the sum of the weights; NUM_TOTAL_TARGET_TOKENS by
        the number of slots, padding included; AVERAGE_PER_SEQUENCE gives each sequence the same
        say, whatever its length.
      weights: float [B, L], 0 where nothing is asked.
      segment_ids: int [B, L], the sequences of packed rows; None: a row is one sequence.

    Returns:
      (factor, a float32 scalar; weights, float32 [B, L]).
    """
    weights = weights.astype(jnp.float32)
    if mode == "NUM_REAL_TARGET_TOKENS":
        return jnp.sum(weights), weights
    if mode == "NUM_TOTAL_TARGET_TOKENS":
        return jnp.asarray(weights.size, jnp.float32), weights
    if mode == "AVERAGE_PER_SEQUENCE":
        totals = _sequence_totals(weights, segment_ids)
        weights = weights / jnp.where(totals > 0, totals, 1.0)
        return jnp.sum(weights), weights
    raise ValueError(f"unknown loss normalisation {mode!r}")


def _sequence_totals(weights: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """float [B, L]: at each slot, the summed weight of the slot's sequence."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.sum(weights, axis=-1, keepdims=True), weights.shape)

    def of_row(row_weights, row_ids):  # [L], [L]
        sums = jax.ops.segment_sum(row_weights, row_ids, num_segments=row_ids.shape[0] + 1)
        return sums[row_ids]

    return jax.vmap(of_row)(weights, segment_ids)
