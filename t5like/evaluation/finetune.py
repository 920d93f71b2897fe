"""Fine-tuning on classification: how far a few steps take the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5like.data.rng import generator
from t5like.evaluation import metrics
from t5like.evaluation.model import TrainedModel, pooled_states
from t5like.evaluation.tasks import ClassificationLoader
from t5like.evaluation.tuning import adamw, tune

# Texts that the scale of the head's inputs is taken from.
_STANDARD_TEXTS = 256


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Test accuracy after a short training of the whole backbone with a fresh linear head.

    The head starts from zero and reads the mean of the last states, shifted and scaled so that
    before the training each of its inputs has mean 0 and variance 1 over some train texts: mean
    states differ little from text to text, by other scales in other models, and a head that had to
    make up for that would spend the few steps on it. AdamW with linear warm-up over a tenth of the
    steps and linear decay; nothing is chosen by the test texts.

    Attributes:
      task: texts and labels.
      steps: updates.
      learning_rate: the highest. The default suits models of a few million parameters; BERT's
        size asks for 2e-5 to 1e-4.
      head_rate: how many times faster the head learns: under Adam, larger inputs come to that.
      batch_size: texts an update, also embedded at once.
      length: tokens of a text that are read.
    """

    task: ClassificationLoader
    steps: int = 50
    learning_rate: float = 1e-3
    head_rate: float = 10.0
    batch_size: int = 32
    length: int = 64

    higher_is_better: ClassVar[dict[str, bool]] = {"accuracy": True}

    def measure(self, model: TrainedModel, seed: int) -> dict[str, float]:
        """{"accuracy": share of the test texts}; the seed draws the batches."""
        task = self.task.load()
        shape = (model.config.d_model, len(task.labels))
        head = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1:])}
        rows = model.rows(task.train_texts, self.length) | {"labels": task.train_labels}
        centre, scale = self._standard(model, task.train_texts)
        standard = {"centre": centre, "scale": scale}
        tuned = tune(
            {"model": model.params, "classifier": head},
            (batch | standard for batch in self._batches(rows, seed)),
            loss=classification_loss,
            config=model.config,
            optimizer=adamw(self.learning_rate, self.steps),
            steps=self.steps,
            seed=seed,
        )
        states = dataclasses.replace(model, params=tuned["model"]).embed(
            task.test_texts, length=self.length, batch_size=self.batch_size
        )
        head = jax.device_get(tuned["classifier"])
        states = (states - centre) * scale
        predicted = np.argmax(states @ head["kernel"] + head["bias"], axis=1)
        return {"accuracy": metrics.accuracy(predicted, task.test_labels)}

    def _standard(self, model: TrainedModel, texts) -> tuple[np.ndarray, np.ndarray]:
        """What is taken from the pooled states and what they are multiplied by, [D] each."""
        some = texts[:_STANDARD_TEXTS]
        states = model.embed(some, length=self.length, batch_size=self.batch_size)
        return states.mean(axis=0), self.head_rate / (states.std(axis=0) + 1e-6)

    def _batches(self, rows: dict[str, np.ndarray], seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Shuffled epochs, one after the other."""
        total = len(rows["labels"])
        needed = self.steps * self.batch_size
        epochs = [
            generator(seed, "fine-tune", epoch).permutation(total)
            for epoch in range(-(-needed // total))
        ]
        order = np.concatenate(epochs)[:needed].reshape(self.steps, self.batch_size)
        for index in order:
            yield {name: value[index] for name, value in rows.items()}


def classification_loss(params: Any, batch, key: jax.Array | None, config) -> jax.Array:
    """Mean cross-entropy of `labels` [B] under the head; `centre` and `scale` [D] are fixed."""
    states = pooled_states(params["model"], batch, config, "mean", key)
    states = (states - batch["centre"]) * batch["scale"]
    head = params["classifier"]
    logits = states @ head["kernel"] + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
