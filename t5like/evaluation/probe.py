"""Linear probing: what a frozen model's embeddings say to a linear classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from t5like.data.rng import generator
from t5like.evaluation import metrics
from t5like.evaluation.model import Pooling, TrainedModel
from t5like.evaluation.tasks import ClassificationLoader


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Test accuracy of multinomial logistic regression on frozen, pooled last states.

    Features are standardised with the train texts' mean and deviation. The inverse strength of
    the L2 penalty is the one of `strengths` that is best on a part of the train texts; with it
    the classifier is fitted anew on all of them.

    Attributes:
      task: texts and labels.
      length: tokens of a text that are read.
      batch_size: texts embedded at once.
      pooling: see TrainedModel.embed.
      strengths: candidates for scikit-learn's C.
      validation: share of the train texts that chooses among them; drawn by the seed.
      shuffle_labels: give the train texts each other's labels, by the seed: a control, whose
        accuracy is that of chance if nothing leaks from train to test.
    """

    task: ClassificationLoader
    length: int = 64
    batch_size: int = 64
    pooling: Pooling = "mean"
    strengths: Sequence[float] = (0.001, 0.01, 0.1, 1.0)
    validation: float = 0.2
    shuffle_labels: bool = False

    higher_is_better: ClassVar[dict[str, bool]] = {"accuracy": True}

    def measure(self, model: TrainedModel, seed: int) -> dict[str, float]:
        """{"accuracy": share of the test texts}."""
        task = self.task.load()
        train, test = (
            model.embed(texts, length=self.length, batch_size=self.batch_size, pooling=self.pooling)
            for texts in (task.train_texts, task.test_texts)
        )
        labels = task.train_labels
        if self.shuffle_labels:
            labels = generator(seed, "shuffled labels").permutation(labels)
        fit = fit_probe(
            train, labels,
            strengths=self.strengths, validation=self.validation, seed=seed,
        )  # fmt: skip
        return {"accuracy": metrics.accuracy(fit.predict(test), task.test_labels)}


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    strengths: Sequence[float],
    validation: float,
    seed: int,
):
    """A fitted scikit-learn pipeline of scaler and logistic regression.

    Args:
      features: float [n, D].
      labels: int [n].
      strengths, validation: see LinearProbe.
      seed: of the validation part.
    """
    order = generator(seed, "probe").permutation(len(labels))
    held, rest = np.split(order, [round(validation * len(labels))])
    best, best_accuracy = strengths[0], -1.0
    for strength in strengths if len(held) else ():
        fit = _fit(features[rest], labels[rest], strength)
        accuracy = metrics.accuracy(fit.predict(features[held]), labels[held])
        if accuracy > best_accuracy:
            best, best_accuracy = strength, accuracy
    return _fit(features, labels, best)


def _fit(features: np.ndarray, labels: np.ndarray, strength: float):
    # Imported here: scikit-learn takes a second, which a program that only trains is spared.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=strength, max_iter=1000)
    return make_pipeline(StandardScaler(), classifier).fit(features.astype(np.float64), labels)
