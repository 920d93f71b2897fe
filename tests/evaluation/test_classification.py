"""Linear probe and fine-tuning on planted data."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from t5like.evaluation.finetune import FineTune
from t5like.evaluation.probe import LinearProbe, fit_probe
from t5like.evaluation.tasks import ClassificationLoader, classification


@dataclasses.dataclass(frozen=True)
class Planted(ClassificationLoader):
    """Random letters; the label says whether there is a "q" among them, or nothing at all."""

    rule: bool = True

    def load(self):
        rng = np.random.default_rng(0)
        pairs = []
        for i in range(360):
            letters = rng.choice(list("abcdefgh"), 12)
            if i % 2:
                letters[rng.integers(12)] = "q"
            pairs.append(("".join(letters), i % 2 if self.rule else int(rng.integers(2))))
        return classification(pairs[:240], pairs[240:], "Planted")


@dataclasses.dataclass(frozen=True)
class PlantedEmbeddings:
    """Stands for a model: embeddings in which a text's letter is a direction, badly scaled."""

    def embed(self, texts, **_):
        rng = np.random.default_rng(len(texts))
        features = rng.normal(size=(len(texts), 8))
        features[:, 0] += [4.0 * ("q" in text) for text in texts]
        return (100 + features * np.logspace(-3, 3, 8)).astype(np.float32)


def test_probe_finds_planted_classes_and_nothing_where_nothing_is():
    model = PlantedEmbeddings()
    assert LinearProbe(Planted()).measure(model, 0)["accuracy"] > 0.95
    assert 0.3 < LinearProbe(Planted(rule=False)).measure(model, 0)["accuracy"] < 0.7


def test_probe_is_scikit_learns_on_standardised_features():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(90, 5)) * [1, 10, 100, 1, 1], rng.integers(0, 3, 90)
    fit = fit_probe(features, labels, strengths=[0.1], validation=0.2, seed=0)
    scaler = StandardScaler().fit(features)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(features), labels)
    new = rng.normal(size=(20, 5)) * [1, 10, 100, 1, 1]
    assert fit.predict_proba(new) == pytest.approx(expected.predict_proba(scaler.transform(new)))


@pytest.mark.parametrize(("signal", "best"), [(2.0, 1.0), (0.0, 1e-9)])
def test_the_validation_part_chooses_the_penalty(signal, best):
    # One text in five has label 1: without a signal it is best to say 0 always.
    labels = (np.arange(200) % 5 == 0).astype(int)
    features = np.random.default_rng(0).normal(size=(200, 60)) + signal * labels[:, None]
    for strengths in ([1e-9, 1.0], [1.0, 1e-9]):
        fit = fit_probe(features, labels, strengths=strengths, validation=0.25, seed=0)
        assert best == fit[-1].C


@pytest.fixture(scope="module")
def tuned(trained):
    """A short fine-tuning on a planted rule, and the model it began with."""
    model = trained("encoder", speaks=False)
    measure = FineTune(Planted(), steps=60, learning_rate=3e-3, batch_size=16, length=16)
    before = jax.tree.map(np.copy, model.params)
    return measure, model, before, measure.measure(model, 1)


def test_fine_tuning_learns_a_planted_rule_and_is_the_same_every_time(tuned):
    measure, model, before, result = tuned
    assert result["accuracy"] > 0.95
    assert measure.measure(model, 1) == result
    assert all(map(np.array_equal, *map(jax.tree.leaves, (before, model.params))))


def test_fine_tuning_learns_nothing_where_nothing_is(tuned):
    measure, model, _, _ = tuned
    shuffled = dataclasses.replace(measure, task=Planted(rule=False))
    assert 0.3 < shuffled.measure(model, 0)["accuracy"] < 0.7


def test_every_train_text_comes_before_one_comes_twice():
    measure = FineTune(Planted(), steps=20, batch_size=16)
    batches = list(measure._batches({"labels": np.arange(240)}, 0))
    drawn = np.concatenate([batch["labels"] for batch in batches])
    assert sorted(drawn[:240]) == list(range(240)) and len(drawn) == 320
    others = next(measure._batches({"labels": np.arange(240)}, 1))["labels"]
    assert not np.array_equal(others, batches[0]["labels"])
