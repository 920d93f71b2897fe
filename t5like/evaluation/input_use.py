"""Does a sequence-to-sequence model use its input? Three numbers on held-out data.

The loss over content tokens (targets that are neither sentinels nor other special tokens),
beside two yardsticks: the unigram entropy of those very tokens, which a model that ignores its
input and its own past cannot beat, and the loss when each example reads another example's
input, which shows what the right input is worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class InputUse:
    """All in nats a content token.

    Attributes:
      loss: with the right input.
      unigram_entropy: of the content tokens under their own frequencies.
      wrong_input_loss: each row reading the encoder input of the row before it.
      tokens: content tokens counted.
    """

    loss: float
    unigram_entropy: float
    wrong_input_loss: float
    tokens: int


def content_weights(targets: np.ndarray, weights: np.ndarray, special_ids) -> np.ndarray:
    """Weights [B, L] of the targets that are asked for and are ordinary tokens: 0 or 1."""
    return ((weights > 0) & ~np.isin(targets, special_ids)).astype(np.float32)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution given by counts [V]."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def with_wrong_inputs(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with every encoder feature taken from the row before."""
    return {
        name: np.roll(value, 1, axis=0) if name.startswith("encoder_") else value
        for name, value in batch.items()
    }


def measure_input_use(
    logits: Callable, params, batches: Iterable[Mapping[str, np.ndarray]], special_ids
) -> InputUse:
    """Measures an encoder-decoder on held-out batches of at least two rows.

    Args:
      logits: (params, batch) -> float [B, L, V], teacher-forced decoder logits.
      params: the model's parameters.
      batches: batches with seqio's encoder-decoder features.
      special_ids: ids that are no content: sentinels, EOS and the like.
    """

    @jax.jit
    def loss_sum(params, batch, weights):
        scores = logits(params, batch).astype(jnp.float32)
        targets = batch["decoder_target_tokens"]
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(scores, axis=-1) - chosen) * weights)

    right = wrong = 0.0
    counts = np.zeros(1, np.int64)
    for batch in batches:
        targets = batch["decoder_target_tokens"]
        weights = content_weights(targets, batch["decoder_loss_weights"], special_ids)
        right += float(loss_sum(params, dict(batch), weights))
        wrong += float(loss_sum(params, with_wrong_inputs(batch), weights))
        seen = np.bincount(targets[weights > 0], minlength=counts.size)
        counts = seen + np.pad(counts, (0, seen.size - counts.size))
    total = int(counts.sum())
    if total == 0:
        return InputUse(float("nan"), float("nan"), float("nan"), 0)
    return InputUse(right / total, unigram_entropy(counts), wrong / total, total)
