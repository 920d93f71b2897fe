"""The device half of distillation: a student's and a teacher's logits and states compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from objectives.heads import LanguageModel, at_asked
from t5like.models.config import ModelConfig
from t5like.models.layers import Dense
from t5like.training.losses import cross_entropy
from t5like.training.terms import Term


class ComparedModel(LanguageModel):
    """A language model whose states are compared with another's.

    Attributes:
      teacher_width: of the other's states, where `hidden_projection` is to take the own ones to
        that width, else None.
    """

    teacher_width: int | None = None

    def setup(self):
        super().setup()
        if self.teacher_width is not None:
            self.hidden_projection = Dense(self.config, self.teacher_width)

    def __call__(self, batch: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        hidden = self.hidden(batch, train=train)
        if self.is_initializing():
            self.project(hidden)
        return self.logits(hidden)

    def states(
        self, batch: Mapping[str, jax.Array], *, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """[B, L, D] of every layer, see Transformer.hidden."""
        return self.model.hidden(batch, train=train, all_layers=True)

    def project(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., the teacher's D]."""
        return hidden if self.teacher_width is None else self.hidden_projection(hidden)


def distillation_losses(
    apply: Callable,
    params: Any,
    teacher_config: ModelConfig,
    teacher_params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    train: bool,
    *,
    stack: str,
    temperature: float,
    weight: float,
    hidden_weight: float = 0.0,
    hidden_layers: Sequence[tuple[int, int]] = ((-1, -1),),
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    predictions: int | None = None,
) -> dict[str, Term]:
    """Terms of a student's loss under the text and under a teacher (see Distillation).

    Args:
      apply: of the student's network, a LanguageModel; a ComparedModel with hidden_weight.
      teacher_params: {"model": its backbone}; no gradient reaches it.
      stack: "encoder" or "decoder", whose targets, weights and states count.
      predictions: see heads.token_losses.

    Returns:
      "cross_entropy" and "z_loss" (if asked for) with coefficient 1 - weight, "distillation" with
      coefficient `weight`, "hidden_distance" (if asked for) with coefficient hidden_weight, and
      the metrics "accuracy" and "teacher_cross_entropy" (the teacher's under the text).
    """
    taught, teacher = jax.lax.stop_gradient(teacher_params), ComparedModel(teacher_config).apply
    rngs, method = {"dropout": rng} if train else {}, "states" if hidden_weight else "hidden"
    ours = apply({"params": params}, batch, train=train, rngs=rngs, method=method)
    theirs = teacher({"params": taught}, batch, method=method)
    if not hidden_weight:
        ours, theirs = (ours,), (theirs,)
    targets = batch[f"{stack}_target_tokens"]
    weights = batch[f"{stack}_loss_weights"].astype(jnp.float32)

    def sums(_, ours, theirs, targets, weights):
        logits = apply({"params": params}, ours, method="logits")
        soft = teacher({"params": taught}, theirs, method="logits")
        hard = cross_entropy(
            logits, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
        )
        divergence = jnp.sum(kl_divergence(logits, soft, temperature) * weights)
        return {
            "cross_entropy": hard.loss_sum,
            "z_loss": hard.z_loss_sum,
            "distillation": temperature**2 * divergence,
            "accuracy": hard.correct_sum,
            "teacher_cross_entropy": cross_entropy(soft, targets, weights).loss_sum,
        }

    found = at_asked(sums, weights > 0, predictions, ours[-1], theirs[-1], targets, weights)
    coefficients = {"cross_entropy": 1.0 - weight, "z_loss": 1.0 - weight, "distillation": weight}
    asked = jnp.sum(weights)
    terms = {
        name: Term(value, asked, coefficients.get(name, 0.0))
        for name, value in found.items()
        if name != "z_loss" or z_loss
    }
    if hidden_weight:
        real = (batch[f"{stack}_segment_ids"] > 0).astype(jnp.float32)
        projected = (apply({"params": params}, ours[s], method="project") for s, _ in hidden_layers)
        pairs = zip(projected, (theirs[t] for _, t in hidden_layers), strict=True)
        distance = sum(jnp.sum(unit_distance(a, b) * real) for a, b in pairs) / len(hidden_layers)
        terms["hidden_distance"] = Term(distance, jnp.sum(real), hidden_weight)
    return terms


# Recomputed in the backward pass, so that of [..., V] arrays only both logits are kept.
@jax.checkpoint
def kl_divergence(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) of two distributions softened by a temperature, in nats.

    Args:
      student, teacher: logits [..., V].

    Returns:
      float32 [...], 0 where both are equal. Its gradient with respect to the student's logits is
      (softmax(student / T) - softmax(teacher / T)) / T.
    """
    log_q, log_p = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
        for logits in (student, jax.lax.stop_gradient(teacher))
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def unit_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distance of two states [..., D], each scaled to length 1: float32 [...], 0 to 4."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    a, b = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12) for x in (a, b))
    return jnp.sum(jnp.square(a - b), axis=-1)
