"""The device half of replaced token detection: generator, main network, and what they lose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives.heads import LogitsFn, at_asked, token_losses
from t5like.inference.sampling import Sampling, choose, row_keys
from t5like.models.config import ModelConfig
from t5like.models.layers import ACTIVATIONS, Dense, dot, kernel_init
from t5like.models.transformer import Transformer
from t5like.training.losses import cross_entropy
from t5like.training.terms import Term

Batch = Mapping[str, jax.Array]

# What the main network is asked -> whether it has a detection head, and its own token head.
TASKS = {
    "replaced_token_detection": (True, False),
    "masked_positions_only": (True, False),
    "replace_mlm": (False, True),
    "all_tokens_mlm": (True, True),
}


# --- networks --------------------------------------------------------------------------------


def generator_config(
    config: ModelConfig, width: float, layers: int | None = None, tied: bool = True
) -> ModelConfig:
    """A generator for the main network `config`: narrower, as deep unless `layers` is set.

    Args:
      config: the main network's.
      width: share of its D, F and heads (at least one each); heads keep their size.
      layers: None: as many as the main network's.
      tied: whether it reads the main network's embeddings, and so has their width E.
    """

    def share(size: int) -> int:
        return max(1, round(size * width))

    heads, kv_heads = share(config.num_heads), config.num_kv_heads
    return dataclasses.replace(
        config,
        num_layers=config.num_layers if layers is None else layers,
        d_model=share(config.d_model),
        d_ff=share(config.d_ff),
        num_heads=heads,
        num_kv_heads=None if kv_heads is None else math.gcd(heads, share(kv_heads)),
        embedding_size=config.embedding_width if tied else None,
        tie_embeddings=True,
        head_transform=True,
        logits_bias=True,
    )


class DetectionHead(nn.Module):
    """A dense layer and activation, then one number a token (Clark et al. 2020, section 3.1)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """States [..., D] -> logits that the token was replaced, float32 [...]."""
        config, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        x = ACTIVATIONS[config.activation](Dense(config, config.d_model, name="transform")(x))
        kernel = self.param("kernel", kernel_init(config), (config.d_model, 1), param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (1,), param_dtype)
        return (dot(x, kernel, config.dtype, "float32") + bias.astype(jnp.float32))[..., 0]


class GeneratorAndDiscriminator(nn.Module):
    """The main network at `model/`, a generator at `generator/`, and `discriminator_head/`.

    Attributes:
      config, generator_config: of the two transformers.
      tied: whether they share token, position and token-type embeddings and the norm over their
        sum; the generator then also predicts with the shared token embedding.
      task: one of TASKS.
    """

    config: ModelConfig
    generator_config: ModelConfig
    tied: bool
    task: str

    def setup(self):
        self.model = Transformer(self.config)
        self.generator = Transformer(self.generator_config)
        detects, _ = TASKS[self.task]
        if detects:
            self.discriminator_head = DetectionHead(self.config)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, jax.Array]:
        """All outputs on one batch: the generator's "draft" logits float32 [B, L, V]; where the
        task has them "replaced" logits float32 [B, L] and "tokens" logits float32 [B, L, V]."""
        detects, predicts = TASKS[self.task]
        outputs = {"draft": self.generator_logits(self.generator_hidden(batch, train=train))}
        hidden = self.hidden(batch, train=train)
        if detects:
            outputs["replaced"] = self.replaced_logits(hidden)
        if predicts:
            outputs["tokens"] = self.logits(hidden)
        return outputs

    def generator_hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The generator's last states [B, L, its D]."""
        embedded = self.model.embed(batch) if self.tied else None
        return self.generator.hidden(batch, train=train, embedded=embedded)

    def generator_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., its D] -> float32 [..., V]."""
        return self.generator.logits(hidden, self.model.token_embedder if self.tied else None)

    def hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The main network's last states [B, L, D]."""
        return self.model.hidden(batch, train=train)

    def replaced_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [...]."""
        return self.discriminator_head(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return self.model.logits(hidden)


# --- losses ----------------------------------------------------------------------------------


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
    targets = batch[f"{stack}_target_tokens"]
    weights = batch[f"{stack}_loss_weights"].astype(jnp.float32)
    segment_ids = batch.get(f"{stack}_segment_ids", jnp.ones_like(targets))

    def run(method: str, inputs: Any, key: jax.Array | None = None) -> jax.Array:
        flags = {} if key is None else {"train": train}
        rngs = {"dropout": key} if train and key is not None else {}
        return apply({"params": params}, inputs, **flags, rngs=rngs, method=method)

    drafted = draft(
        lambda states: run("generator_logits", states),
        run("generator_hidden", batch, draft_key),
        targets,
        weights,
        sample_key,
        temperature=temperature,
        disallow_correct=disallow_correct,
        predictions=predictions,
    )
    asked, real = jnp.sum(weights), (segment_ids > 0).astype(jnp.float32)
    replaced = (weights > 0) & (drafted.tokens != targets)
    terms = {
        "generator_cross_entropy": Term(drafted.loss_sum, asked, generator_weight),
        "generator_accuracy": Term(drafted.correct_sum, asked, 0.0),
        "replaced_fraction": Term(jnp.sum(replaced * real), jnp.sum(real), 0.0),
    }
    hidden = run("hidden", {**batch, f"{stack}_input_tokens": drafted.tokens}, main_key)
    detects, _ = TASKS[task]
    if detects:
        logits = run("replaced_logits", hidden)
        flagged = (logits > 0) * real
        hits = jnp.sum(flagged * replaced)
        terms["detection_precision"] = Term(hits, jnp.sum(flagged), 0.0)
        terms["detection_recall"] = Term(hits, jnp.sum(replaced * real), 0.0)
    token_logits = lambda states: run("logits", states)  # noqa: E731
    if task == "replace_mlm":
        loss, _, correct = token_losses(
            token_logits, hidden, targets, weights,
            z_loss=0.0, label_smoothing=0.0, predictions=predictions,
        )  # fmt: skip
        terms["cross_entropy"] = Term(loss, asked, discriminator_weight)
        return terms | {"accuracy": Term(correct, asked, 0.0)}
    if task == "all_tokens_mlm":
        losses = copying_cross_entropy(token_logits(hidden), logits, targets, replaced)
        loss = jnp.sum(losses * real)
        return terms | {"cross_entropy": Term(loss, jnp.sum(real), discriminator_weight)}
    where = weights * real if task == "masked_positions_only" else real
    loss = jnp.sum(jax.nn.softplus(jnp.where(replaced, -logits, logits)) * where)
    terms["replaced_token_detection"] = Term(loss, jnp.sum(where), discriminator_weight)
    return terms


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
