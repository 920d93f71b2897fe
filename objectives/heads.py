"""The device half that token-predicting objectives share: one network, one set of loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer
from t5like.training.losses import cross_entropy
from t5like.training.terms import Term

LogitsFn = Callable[[jax.Array], jax.Array]


class LanguageModel(nn.Module):
    """The transformer at `model/`, with its own output layer and no other head."""

    config: ModelConfig

    def setup(self):
        self.model = Transformer(self.config)

    def __call__(self, batch: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Logits [B, L, V] of the predicting stack."""
        return self.model(batch, train=train)

    def hidden(self, batch: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Last hidden states [B, L, D] of the predicting stack."""
        return self.model.hidden(batch, train=train)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V]."""
        return self.model.logits(hidden)


def next_token_losses(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    train: bool,
    *,
    stack: str = "decoder",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    predictions: int | None = None,
) -> dict[str, Term]:
    """Cross-entropy of the batch's targets under the LanguageModel's logits.

    Targets are read where layout put them: shifted against the inputs for a decoder's text, at
    the token's own place for masked language modelling.

    Args:
      apply: LanguageModel(config).apply.
      stack: "encoder" or "decoder", whose targets and weights count.
      predictions: see `token_losses`.

    Returns:
      Terms "cross_entropy", "z_loss" (if asked for) and the metric "accuracy", each over the same
      weight.
    """
    rngs = {"dropout": rng} if train else {}
    hidden = apply({"params": params}, batch, train=train, rngs=rngs, method="hidden")
    weights = batch[f"{stack}_loss_weights"]
    loss, z, correct = token_losses(
        lambda states: apply({"params": params}, states, method="logits"),
        hidden,
        batch[f"{stack}_target_tokens"],
        weights,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        predictions=predictions,
    )
    weight = jnp.sum(weights.astype(jnp.float32))
    terms = {"cross_entropy": Term(loss, weight)}
    if z_loss:
        terms["z_loss"] = Term(z, weight)
    return terms | {"accuracy": Term(correct, weight, coefficient=0.0)}


def token_losses(
    logits: LogitsFn,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float,
    label_smoothing: float,
    predictions: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of loss, z-loss and correct predictions, with logits for asked positions only.

    Args:
      logits: [..., D] -> [..., V].
      hidden: [B, L, D].
      targets, weights: [B, L].
      predictions: the usual most positions of a row with weight. So many are gathered from each
        row, which spares most of the [B, L, V] logits where few tokens are predicted. Only
        speed depends on it: should a row have more, the whole batch is computed in full.
        None: always in full.
    """

    def sums(hidden, targets, weights):
        result = cross_entropy(
            logits(hidden), targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
        )
        return result.loss_sum, result.z_loss_sum, result.correct_sum

    if predictions is None or predictions >= targets.shape[1]:
        return sums(hidden, targets, weights)

    # Recomputed in the backward pass: else `cond` keeps both branches' logits as residuals.
    @jax.checkpoint
    def gathered(hidden, targets, weights):
        _, slots = jax.lax.top_k((weights > 0).astype(jnp.float32), predictions)  # [B, P]
        hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
        targets, weights = (jnp.take_along_axis(x, slots, axis=1) for x in (targets, weights))
        return sums(hidden, targets, weights)

    fits = jnp.max(jnp.sum(weights > 0, axis=1)) <= predictions
    return jax.lax.cond(fits, gathered, jax.checkpoint(sums), hidden, targets, weights)
