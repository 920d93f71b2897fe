"""The losses of replaced token detection: a generator's, its samples, and the main network's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.heads import LogitsFn, at_asked, token_losses
from objectives.heads_rtd import Batch
from t5like.inference.sampling import Sampling, choose, row_keys
from t5like.training.losses import cross_entropy
from t5like.training.terms import Term


class Draft(NamedTuple):
    """What a generator made of a batch.

    Attributes:
      loss_sum, correct_sum: of its predictions, float32 scalars.
      tokens: int32 [B, L], the text with samples at the drawn positions; no gradient.
    """

    loss_sum: jax.Array
    correct_sum: jax.Array
    tokens: jax.Array


def draft(
    logits: LogitsFn,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
    predictions: int | None = None,
) -> Draft:
    """The generator's loss, and a sample of it at every drawn position.

    Samples are drawn by the Gumbel trick, each with a key of its own row and slot: they do not
    depend on which positions are computed along with them.

    Args:
      logits: [..., D] -> [..., V].
      hidden: [B, L, D], of the generator.
      targets, weights: [B, L], the text and 1 at the drawn positions.
      key: for the samples.
      temperature: divides the logits; 0 takes the likeliest token.
      disallow_correct: never sample the text's own token.
      predictions: see heads.token_losses.
    """
    rows = jnp.arange(targets.shape[0])[:, None]
    text = jnp.asarray(targets, jnp.int32)

    def compute(slots, hidden, targets, weights):
        scores = logits(hidden)  # [B, P, V]
        result = cross_entropy(scores, targets, weights)
        scores = jax.lax.stop_gradient(scores)
        if disallow_correct:
            classes = jax.lax.broadcasted_iota(targets.dtype, scores.shape, scores.ndim - 1)
            scores = jnp.where(classes == targets[..., None], -jnp.inf, scores)
        keys = row_keys(key, jnp.broadcast_to(rows, slots.shape).ravel(), slots.ravel())
        flat = scores.reshape(-1, scores.shape[-1])
        sampled = choose(keys, flat, Sampling(temperature)).reshape(slots.shape)
        sampled = jnp.where(weights > 0, sampled, targets)
        return Draft(result.loss_sum, result.correct_sum, text.at[rows, slots].set(sampled))

    return at_asked(compute, weights > 0, predictions, hidden, text, weights)


def replaced_token_losses(
    apply: Callable,
    params: Any,
    batch: Batch,
    rng: jax.Array,
    train: bool,
    *,
    stack: str,
    task: str,
    generator_weight: float,
    discriminator_weight: float,
    temperature: float,
    disallow_correct: bool,
    predictions: int | None,
) -> dict[str, Term]:
    """Terms of both networks on one batch.

    Args:
      apply: GeneratorAndDiscriminator.apply.
      rng: for dropout of each network, if `train`, and for the samples.
      stack: "encoder" or "decoder", whose features are read.
      predictions: see heads.token_losses.
      For the rest see objectives/electra.py.

    Returns:
      "generator_cross_entropy" over the drawn positions; the main network's
      "replaced_token_detection" or "cross_entropy"; and metrics: "generator_accuracy",
      "replaced_fraction" of all tokens and, where there is a detection head, its
      "detection_precision" and "detection_recall" at threshold 1/2, whose weights count what was
      flagged and what was replaced.
    """
    draft_key, main_key, sample_key = jax.random.split(rng, 3)

    def states(method: str, inputs: Batch, key: jax.Array) -> jax.Array:
        rngs = {"dropout": key} if train else {}
        return apply({"params": params}, inputs, train=train, rngs=rngs, method=method)

    def head(method: str) -> LogitsFn:
        return lambda hidden: apply({"params": params}, hidden, method=method)

    targets = batch[f"{stack}_target_tokens"]
    drawn = batch[f"{stack}_loss_weights"].astype(jnp.float32)
    real = _real(batch, stack)
    drafted = draft(
        head("generator_logits"),
        states("generator_hidden", batch, draft_key),
        targets,
        drawn,
        sample_key,
        temperature=temperature,
        disallow_correct=disallow_correct,
        predictions=predictions,
    )
    replaced = (drawn > 0) & (drafted.tokens != targets)
    asked = jnp.sum(drawn)
    terms = {
        "generator_cross_entropy": Term(drafted.loss_sum, asked, generator_weight),
        "generator_accuracy": Term(drafted.correct_sum, asked, 0.0),
        "replaced_fraction": Term(jnp.sum(replaced * real), jnp.sum(real), 0.0),
    }
    hidden = states("hidden", {**batch, f"{stack}_input_tokens": drafted.tokens}, main_key)
    if task == "replace_mlm":
        loss, _, correct = token_losses(
            head("logits"), hidden, targets, drawn,
            z_loss=0.0, label_smoothing=0.0, predictions=predictions,
        )  # fmt: skip
        terms["cross_entropy"] = Term(loss, asked, discriminator_weight)
        return terms | {"accuracy": Term(correct, asked, 0.0)}

    logits = head("replaced_logits")(hidden)
    terms |= _detection_metrics(logits, replaced, real)
    name, where = "replaced_token_detection", real
    if task == "all_tokens_mlm":
        name = "cross_entropy"
        losses = copying_cross_entropy(head("logits")(hidden), logits, targets, replaced)
    else:
        losses = jax.nn.softplus(jnp.where(replaced, -logits, logits))
        where = drawn * real if task == "masked_positions_only" else real
    return terms | {name: Term(jnp.sum(losses * where), jnp.sum(where), discriminator_weight)}


def _real(batch: Batch, stack: str) -> jax.Array:
    """float32 [B, L], 1 where there is no padding."""
    tokens = batch[f"{stack}_target_tokens"]
    segment_ids = batch.get(f"{stack}_segment_ids", jnp.ones_like(tokens))
    return (segment_ids > 0).astype(jnp.float32)


def _detection_metrics(logits: jax.Array, replaced: jax.Array, real: jax.Array) -> dict[str, Term]:
    """Precision and recall of replaced tokens, all [B, L]."""
    flagged, replaced = (logits > 0) * real, replaced * real
    hits = jnp.sum(flagged * replaced)
    return {
        "detection_precision": Term(hits, jnp.sum(flagged), 0.0),
        "detection_recall": Term(hits, jnp.sum(replaced), 0.0),
    }


def copying_cross_entropy(
    token_logits: jax.Array, replaced_logits: jax.Array, targets: jax.Array, replaced: jax.Array
) -> jax.Array:
    """-log p(target) where p = c [the input token] + (1 - c) softmax(token_logits).

    c, the probability to copy the input, is 1 - sigmoid(replaced_logits) (Clark et al. 2020,
    section 3.4, "All-Tokens MLM").

    Args:
      token_logits: float32 [..., V].
      replaced_logits: float32 [...].
      targets: int [...].
      replaced: bool [...], where the input token is not the target.

    Returns:
      float32 [...], in nats.
    """
    target_logits = jnp.take_along_axis(token_logits, targets[..., None], axis=-1)[..., 0]
    predicted = target_logits - jax.nn.logsumexp(token_logits, axis=-1)
    predicted += jax.nn.log_sigmoid(replaced_logits)
    copied = jnp.logaddexp(jax.nn.log_sigmoid(-replaced_logits), predicted)
    return -jnp.where(replaced, predicted, copied)
