"""The device half of ERNIE-Gram: a model of tokens and n-grams, and what it loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives.heads import token_losses
from objectives.heads_rtd import DetectionHead
from objectives.losses_rtd import draft
from t5like.models.config import ModelConfig
from t5like.models.layers import Embed
from t5like.models.transformer import Head, Transformer
from t5like.training.terms import Term

Batch = Mapping[str, jax.Array]


def ngram_head_config(config: ModelConfig, ngrams: int) -> ModelConfig:
    """A transformer's config -> that of the head which predicts n-grams from its states.

    The n-grams' output embedding is their input embedding, of the model's E, whether or not the
    tokens' are tied; its logits are scaled as those of tied tokens would be.
    """
    scaled = config.scale_tied_logits if config.tie_embeddings else config.initializer == "fan_in"
    return dataclasses.replace(
        config,
        vocab_size=ngrams,
        tie_embeddings=True,
        scale_tied_logits=scaled,
        head_transform=config.head_transform or config.embedding_width != config.d_model,
    )


class NgramModel(nn.Module):
    """The transformer at `model/`, n-grams at `ngram_embedder/`, and heads for both.

    A unit's id is a token's, or V + an n-gram's number: <V_F, V_N>.

    Attributes:
      config: of the transformer.
      tokens, ngrams: V, the size of the vocabulary, and V_N.
      generator_config: of the generator at `generator/`, which reads the same embeddings, as
        heads_rtd.generator_config makes it; None: there is none, nor a `relation_head/`.
    """

    config: ModelConfig
    tokens: int
    ngrams: int
    generator_config: ModelConfig | None = None

    def setup(self):
        config = self.config
        self.model = Transformer(config)
        self.ngram_embedder = Embed(config, self.ngrams, config.embedding_width)
        self.ngram_head = Head(ngram_head_config(config, self.ngrams))
        if self.generator_config is not None:
            self.generator = Transformer(self.generator_config)
            self.generator_ngram_head = Head(ngram_head_config(self.generator_config, self.ngrams))
            self.relation_head = DetectionHead(config)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, jax.Array]:
        """All outputs on one batch: "units" logits float32 [B, L, V + V_N], "tokens" logits
        float32 [B, L, V]; with a generator "draft" logits like "units" and "replaced" logits
        float32 [B, L]."""
        hidden = self.hidden(batch, train=train)
        outputs = {"units": self.unit_logits(hidden), "tokens": self.logits(hidden)}
        if self.generator_config is not None:
            outputs["draft"] = self.generator_logits(self.generator_hidden(batch, train=train))
            outputs["replaced"] = self.replaced_logits(hidden)
        return outputs

    def hidden(
        self, batch: Batch, *, units: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """The model's last states [B, L, D].

        Args:
          batch: features, see t5like.models.transformer.Transformer.
          units: int [B, L], units to read in place of the predicting stack's input tokens.
          train: whether dropout is on.
        """
        embeddings = None if units is None else self._embed(units)
        return self.model.hidden(batch, train=train, token_embeddings=embeddings)

    def _embed(self, units: jax.Array) -> jax.Array:
        """int [B, L] -> [B, L, E]."""
        is_token = units < self.tokens
        tokens = self.model.embed_tokens(jnp.where(is_token, units, 0))
        ngrams = self.ngram_embedder(jnp.where(is_token, 0, units - self.tokens))
        return jnp.where(is_token[..., None], tokens, ngrams)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """States [..., D] -> logits of tokens, float32 [..., vocab_size]."""
        return self.model.logits(hidden)

    def unit_logits(self, hidden: jax.Array) -> jax.Array:
        """States [..., D] -> logits of units, float32 [..., V + V_N]."""
        ngrams = self.ngram_head(hidden, self.ngram_embedder)
        return jnp.concatenate([self.logits(hidden)[..., : self.tokens], ngrams], axis=-1)

    def generator_hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The generator's last states [B, L, its D]."""
        return self.generator.hidden(batch, train=train, embedded=self.model.embed(batch))

    def generator_logits(self, hidden: jax.Array) -> jax.Array:
        """The generator's states -> logits of units, float32 [..., V + V_N]."""
        tokens = self.generator.logits(hidden, self.model.token_embedder)[..., : self.tokens]
        ngrams = self.generator_ngram_head(hidden, self.ngram_embedder)
        return jnp.concatenate([tokens, ngrams], axis=-1)

    def replaced_logits(self, hidden: jax.Array) -> jax.Array:
        """States [..., D] -> logits that what stands there was replaced, float32 [...]."""
        return self.relation_head(hidden)


def ngram_losses(
    apply: Callable,
    params: Any,
    batch: Batch,
    rng: jax.Array,
    train: bool,
    *,
    stack: str,
    relation: bool,
    coefficients: Mapping[str, float],
    masks: int,
    queries: int,
) -> dict[str, Term]:
    """Terms of explicit n-gram masking on one batch, see objectives/ernie_gram.py.

    Args:
      apply: NgramModel.apply.
      rng: for dropout of each network, if `train`, and for the generator's samples.
      stack: "encoder" or "decoder", whose features are read.
      relation: whether the model reads what the generator samples.
      coefficients: of "coarse", "fine", "generator" and "relation".
      masks, queries: the usual most of each in a row, see heads.token_losses.

    Returns:
      "coarse_cross_entropy" over the hidden units; where there are queries "fine_cross_entropy"
      over their tokens; with `relation` "generator_cross_entropy" over the hidden units and
      "replaced_token_detection" over all units of the text. The metrics are the accuracy of
      each, and the "replaced_fraction" of the hidden units.
    """
    draft_key, main_key, sample_key = jax.random.split(rng, 3)
    weights = batch[f"{stack}_loss_weights"].astype(jnp.float32)
    isolated = batch.get(f"{stack}_isolated")
    hides = weights if isolated is None else weights * (1 - isolated)
    wanted, hidden_units = batch[f"{stack}_ngram_targets"], jnp.sum(hides)
    terms: dict[str, Term] = {}

    def run(method: str, *inputs: jax.Array, key: jax.Array | None = None, **options):
        if key is not None:
            options |= {"train": train, "rngs": {"dropout": key} if train else {}}
        return apply({"params": params}, *inputs, method=method, **options)

    def add(name: str, sums: tuple[jax.Array, jax.Array], weight: jax.Array) -> None:
        loss_name = "replaced_token_detection" if name == "relation" else f"{name}_cross_entropy"
        terms[loss_name] = Term(sums[0], weight, coefficients[name])
        terms[f"{name}_accuracy"] = Term(sums[1], weight, 0.0)

    def predicted(method: str, hidden, targets, weights, most: int):
        loss, _, correct = token_losses(
            lambda states: run(method, states), hidden, targets, weights,
            z_loss=0.0, label_smoothing=0.0, predictions=most,
        )  # fmt: skip
        return loss, correct

    units = None
    if relation:
        drafted = draft(
            lambda states: run("generator_logits", states),
            run("generator_hidden", batch, key=draft_key),
            wanted, hides, sample_key, predictions=masks,
        )  # fmt: skip
        add("generator", (drafted.loss_sum, drafted.correct_sum), hidden_units)
        units = jnp.where(hides > 0, drafted.tokens, batch[f"{stack}_input_tokens"])
        replaced = (hides > 0) & (drafted.tokens != wanted)
        terms["replaced_fraction"] = Term(jnp.sum(replaced), hidden_units, 0.0)

    hidden = run("hidden", batch, key=main_key, units=units)
    add("coarse", predicted("unit_logits", hidden, wanted, hides, masks), hidden_units)
    if isolated is not None:
        asks = weights * isolated
        targets = batch[f"{stack}_target_tokens"]
        add("fine", predicted("logits", hidden, targets, asks, queries), jnp.sum(asks))
    if relation:
        counted = batch[f"{stack}_unit_starts"].astype(jnp.float32)
        logits = run("replaced_logits", hidden)
        loss = jnp.sum(jax.nn.softplus(jnp.where(replaced, -logits, logits)) * counted)
        add("relation", (loss, jnp.sum(((logits > 0) == replaced) * counted)), jnp.sum(counted))
    return terms
