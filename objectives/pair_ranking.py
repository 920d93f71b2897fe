"""The device half of PROP: masked language modelling, and a score for each member of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives.heads import token_losses
from t5like.models.config import ModelConfig
from t5like.models.flops import train_flops as backbone_flops
from t5like.models.layers import Dense, Dropout
from t5like.models.transformer import Transformer
from t5like.training.terms import Term

# [CLS] word [SEP] token [SEP]
_SHORTEST_PAIR = 5


class SummaryHead(nn.Module):
    """BERT's pooler on the state of a text's first slot, dropout, and a linear score."""

    config: ModelConfig

    @nn.compact
    def __call__(self, states: jax.Array, *, train: bool = False) -> jax.Array:
        """states [B, P, D] -> scores, float32 [B, P]."""
        pooled = nn.tanh(Dense(self.config, self.config.d_model, name="pooler")(states))
        pooled = Dropout(self.config, train)(pooled)
        return Dense(self.config, 1, name="score")(pooled)[..., 0].astype(jnp.float32)


class PairRanker(nn.Module):
    """The backbone at `model/`, which reads all M members of an example, and `prop_head/`."""

    config: ModelConfig

    def setup(self):
        self.model = Transformer(self.config)
        self.prop_head = SummaryHead(self.config)

    def __call__(
        self, batch: Mapping[str, jax.Array], *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """batch {feature: [B, M, L]} -> logits [B, M, L, V] and scores [B, M, P]."""
        hidden = self.hidden(batch, train=train)
        return self.logits(hidden), self.scores(hidden, pair_starts(batch)[0], train=train)

    def hidden(self, batch: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Last hidden states [B, M, L, D]; each member is a row of its own."""
        rows = {name: _rows(array) for name, array in batch.items()}
        hidden = self.model.hidden(rows, train=train)
        return hidden.reshape(*batch["encoder_input_tokens"].shape, -1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V]."""
        return self.model.logits(hidden)

    def scores(self, hidden: jax.Array, slots: jax.Array, *, train: bool = False) -> jax.Array:
        """Scores, float32 [B, M, P], of the texts that start at slots int [B, P]."""
        states = jnp.take_along_axis(hidden, slots[:, None, :, None], axis=2)  # [B, M, P, D]
        return self.prop_head(_rows(states), train=train).reshape(states.shape[:-1])


def pair_starts(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Where the pairs of each row start, whether packed or one a row.

    Args:
      batch: of layout's `Members`, {feature: [B, M, L]}.

    Returns:
      (slots int [B, P], weights float32 [B, P]): weight 0 where a row has fewer than P pairs. P
      is how many of the shortest pairs a row could hold.
    """
    positions, segments = (batch[f"encoder_{x}"][:, 0] for x in ("positions", "segment_ids"))
    starts = ((positions == 0) & (segments > 0)).astype(jnp.float32)  # [B, L]
    weights, slots = jax.lax.top_k(starts, most_pairs(starts.shape[1]))
    return slots, weights


def most_pairs(length: int) -> int:
    """P of `pair_starts` for rows of so many tokens."""
    return -(-length // _SHORTEST_PAIR)


def pair_loss(better: jax.Array, worse: jax.Array) -> jax.Array:
    """1 - (p+ - p-) of p = softmax of both scores [...]; lies in (0, 2).

    That difference is tanh of half the scores' difference. Being below 1, it never reaches the
    hinge of a ranking loss with margin 1. This is not max(0, 1 - s+ + s-) on the scores.
    """
    return 1.0 - jnp.tanh((better - worse) / 2)


def losses(
    apply: Callable,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    train: bool,
    *,
    ranking_weight: float,
    mlm_weight: float,
    predictions: int | None,
) -> dict[str, Term]:
    """Terms of a batch {feature: [B, 2, L]} whose first members are the better ones.

    Args:
      apply: PairRanker(config).apply.
      predictions: see heads.token_losses.

    Returns:
      "ranking" over pairs and "cross_entropy" over hidden tokens, each with its coefficient, and
      the metrics "ranking_accuracy" and "accuracy".
    """
    rngs = {"dropout": rng} if train else {}

    def call(method, *inputs, **kwargs):
        return apply({"params": params}, *inputs, **kwargs, method=method)

    hidden = call("hidden", batch, train=train, rngs=rngs)
    slots, pairs = pair_starts(batch)
    scores = call("scores", hidden, slots, train=train, rngs=rngs)
    better, worse = scores[:, 0], scores[:, 1]

    weights = _rows(batch["encoder_loss_weights"])
    targets = _rows(batch["encoder_target_tokens"])
    loss, _, correct = token_losses(
        lambda states: call("logits", states), _rows(hidden), targets, weights,
        z_loss=0.0, label_smoothing=0.0, predictions=predictions,
    )  # fmt: skip
    count, tokens = jnp.sum(pairs), jnp.sum(weights.astype(jnp.float32))
    return {
        "ranking": Term(jnp.sum(pair_loss(better, worse) * pairs), count, ranking_weight),
        "cross_entropy": Term(loss, tokens, mlm_weight),
        "ranking_accuracy": Term(jnp.sum((better > worse) * pairs), count, 0.0),
        "accuracy": Term(correct, tokens, 0.0),
    }


def train_flops(config: ModelConfig, spec: Mapping[str, tuple], predictions: int | None) -> float:
    """Model FLOPs of a training step, forward and backward, the head included.

    Args:
      spec: {feature: (shape [B, M, L], dtype)}.
      predictions: see heads.token_losses.
    """
    batch, members, length = spec["encoder_input_tokens"][0]
    rows = {"encoder_input_tokens": ((batch * members, length), None)}
    width = config.d_model
    head = 2.0 * batch * members * most_pairs(length) * (width * width + width)
    return backbone_flops(config, rows, predictions) + 3.0 * head


def _rows(array: jax.Array) -> jax.Array:
    """[B, M, ...] -> [B * M, ...]."""
    return array.reshape(-1, *array.shape[2:])
