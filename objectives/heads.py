"""The device half that token-predicting objectives share: one network, one set of loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer
from t5like.training.losses import cross_entropy
from t5like.training.terms import Term

LogitsFn = Callable[[jax.Array], jax.Array]


class Groups(NamedTuple):
    """Kinds of targets whose losses are reported one by one.

    Attributes:
      feature: name of the batch's int32 [B, L] feature, without its stack: k where the slot is
        of names[k - 1], 0 where it is of none.
      names: of the kinds.
    """

    feature: str
    names: tuple[str, ...]


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
    groups: Groups | None = None,
) -> dict[str, Term]:
    """Cross-entropy of the batch's targets under the LanguageModel's logits.

    Targets are read where layout put them: shifted against the inputs for a decoder's text, at
    the token's own place for masked language modelling.

    Args:
      apply: LanguageModel(config).apply.
      stack: "encoder" or "decoder", whose targets and weights count.
      predictions: see `token_losses`.
      groups: kinds of targets to tell apart.

    Returns:
      Terms "cross_entropy", "z_loss" (if asked for) and the metric "accuracy", each over the same
      weight, and for each group the metric "cross_entropy_NAME" over its own.
    """
    rngs = {"dropout": rng} if train else {}
    hidden = apply({"params": params}, batch, train=train, rngs=rngs, method="hidden")
    weights = batch[f"{stack}_loss_weights"].astype(jnp.float32)
    if groups is not None:
        group = batch[f"{stack}_{groups.feature}"]
        numbers = jnp.arange(len(groups.names) + 1)[:, None, None]
        weights = jnp.where(group == numbers, weights, 0.0)  # [G, B, L]
    loss, z, correct = token_losses(
        lambda states: apply({"params": params}, states, method="logits"),
        hidden,
        batch[f"{stack}_target_tokens"],
        weights,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        predictions=predictions,
    )
    asked = jnp.sum(weights, axis=(-2, -1))
    weight = jnp.sum(asked)
    terms = {"cross_entropy": Term(jnp.sum(loss), weight)}
    if z_loss:
        terms["z_loss"] = Term(jnp.sum(z), weight)
    terms["accuracy"] = Term(jnp.sum(correct), weight, coefficient=0.0)
    for k, name in enumerate(groups.names if groups else (), start=1):
        terms[f"cross_entropy_{name}"] = Term(loss[k], asked[k], coefficient=0.0)
    return terms


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
      targets: [B, L].
      weights: [B, L], or [G, B, L] for G sums of each, [G].
      predictions: the usual most positions of a row with weight. So many are gathered from each
        row, which spares most of the [B, L, V] logits where few tokens are predicted. Only
        speed depends on it: should a row have more, the whole batch is computed in full.
        None: always in full.
    """
    single = weights.ndim == 2
    weights = weights[..., None] if single else jnp.moveaxis(weights, 0, -1)  # [B, L, G]

    def sums(_, hidden, targets, weights):
        result = cross_entropy(
            logits(hidden),
            targets,
            weights[..., 0] if single else jnp.moveaxis(weights, -1, 0),
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )
        return result.loss_sum, result.z_loss_sum, result.correct_sum

    asked = jnp.any(weights > 0, axis=-1)
    return at_asked(sums, asked, predictions, hidden, targets, weights)


def at_asked(
    compute: Callable[..., Any],
    asked: jax.Array,
    predictions: int | None,
    *features: jax.Array,
) -> Any:
    """`compute` over positions that are asked for, or over all if a row asks for too many.

    Args:
      compute: (slots int [B, P], features [B, P, ...]) -> a tree whose shapes do not depend on
        P; positions that are not asked for may come along, and must not change its values.
      asked: bool [B, L].
      predictions: P, see `token_losses`.
      *features: [B, L, ...] each.
    """
    length = asked.shape[1]

    def everywhere(*features):
        return compute(jnp.broadcast_to(jnp.arange(length), asked.shape), *features)

    if predictions is None or predictions >= length:
        return everywhere(*features)

    # Recomputed in the backward pass: else `cond` keeps both branches' logits as residuals.
    @jax.checkpoint
    def gathered(*features):
        _, slots = jax.lax.top_k(asked.astype(jnp.float32), predictions)  # [B, P]
        return compute(slots, *(_take(feature, slots) for feature in features))

    fits = jnp.max(jnp.sum(asked, axis=1)) <= predictions
    return jax.lax.cond(fits, gathered, jax.checkpoint(everywhere), *features)


def _take(feature: jax.Array, slots: jax.Array) -> jax.Array:
    """feature [B, L, ...] at slots [B, P] -> [B, P, ...]."""
    slots = slots.reshape(*slots.shape, *(1,) * (feature.ndim - 2))
    return jnp.take_along_axis(feature, slots, axis=1)
