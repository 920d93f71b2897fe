"""Bi-encoder retrieval, zero-shot and after a few labelled queries."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5like.errors import UserError
from t5like.evaluation import retrieval
from t5like.evaluation.retrieval import FineTunedRetrieval, Retrieval
from t5like.evaluation.tasks import RetrievalLoader, RetrievalTask

LETTERS = "abcdefghijklmnopqrst"


@dataclasses.dataclass(frozen=True)
class Capitals(RetrievalLoader):
    """A query names a letter; the document that belongs to it has the capital."""

    def load(self):
        rng = np.random.default_rng(0)
        documents = [f"{letter.upper()} is {rng.integers(99)}" for letter in LETTERS]
        queries = [f"find {letter}" for letter in LETTERS]
        train = [f"seek {letter}" for letter in LETTERS]
        gains = tuple({i: 1.0} for i in range(len(LETTERS)))
        return RetrievalTask(tuple(documents), tuple(queries), gains, tuple(train), gains)


class SameSpace:
    """Stands for a model that embeds a letter and its capital alike, far from the origin."""

    def embed(self, texts, **_):
        found = [
            [float(letter in text or letter.upper() in text) for letter in LETTERS]
            for text in (text.replace("find", "").replace("is", "") for text in texts)
        ]
        return 50 + np.array(found, np.float32)


@pytest.mark.parametrize("transform", ["centre", "whiten", "none"])
def test_a_model_that_knows_ranks_first(transform):
    assert Retrieval(Capitals(), transform).measure(SameSpace(), 0) == {
        "ndcg@10": pytest.approx(1),
        "recall@10": pytest.approx(1),
    }


def test_whitened_documents_have_unit_variance_in_every_direction():
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)) + 3
    queries, white = retrieval.transformed(documents[:5], documents, "whiten")
    assert np.cov(white, rowvar=False) == pytest.approx(np.eye(4), abs=1e-6)
    assert queries == pytest.approx(white[:5])
    with pytest.raises(UserError, match="'centre'"):
        retrieval.transformed(documents, documents, "center")


def test_labelled_queries_teach_what_belongs_together(trained):
    model = trained("encoder", speaks=False)
    task = Capitals()
    shape = dict(length=12, batch_size=20, k=3)
    tuning = dict(labelled=20, queries_per_step=16, steps=60, learning_rate=3e-2)
    zero_shot = Retrieval(task, **shape).measure(model, 0)
    tuned = FineTunedRetrieval(task, **shape, **tuning)
    result = tuned.measure(model, 0)
    assert set(result) == set(tuned.higher_is_better) == {"ndcg@3", "recall@3"}
    assert result["ndcg@3"] > zero_shot["ndcg@3"] + 0.3
    assert tuned.measure(model, 0) == result


def test_the_loss_is_cross_entropy_over_the_batch_without_what_is_hidden(monkeypatch):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 4))
    monkeypatch.setattr(retrieval, "pooled_states", lambda *_: jnp.array(states))
    hidden = np.zeros((3, 3), bool)
    hidden[0, 2] = True
    batch = {"hidden": hidden, "temperature": np.float32(0.5)}
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    odds = np.exp(unit[:3] @ unit[3:].T / 0.5) * ~hidden
    expected = -np.log(np.diag(odds) / odds.sum(axis=1)).mean()
    assert retrieval.contrastive_loss({}, batch, None, None) == pytest.approx(expected, rel=1e-5)


def test_too_few_labelled_queries_are_an_error(trained):
    with pytest.raises(UserError, match="labelled is 21; .* 20 train queries"):
        FineTunedRetrieval(Capitals(), labelled=21).measure(trained("encoder", speaks=False), 0)
