"""Metrics against worked examples and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from t5like.evaluation import metrics


def test_ndcg_of_a_worked_example():
    # Ranked gains 3, 2, 3, 0, 1, 2 (the example of many textbooks): DCG 6.861 over 7.141.
    scores = np.array([[6.0, 5, 4, 3, 2, 1]])
    gains = np.array([[3.0, 2, 3, 0, 1, 2]])
    assert metrics.ndcg(scores, gains, 6) == pytest.approx([0.9608], abs=1e-4)


def test_ndcg_and_recall_of_one_relevant_document():
    scores = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    gains = np.array([[0, 0, 1.0], [1.0, 0, 0]])
    assert metrics.ndcg(scores, gains, 3) == pytest.approx([1 / math.log2(4), 1])
    assert metrics.ndcg(scores, gains, 2) == pytest.approx([0, 1])
    assert metrics.recall(scores, gains, 2) == pytest.approx([0, 1])


@pytest.mark.parametrize("k", [1, 5, 10, 40])
def test_ndcg_equals_scikit_learn(k):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(7, 30))
    gains = rng.integers(0, 4, size=(7, 30)).astype(float)
    expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gains, scores, strict=True)]
    assert metrics.ndcg(scores, gains, k) == pytest.approx(expected)


def test_a_query_without_gain_counts_nothing_and_equal_scores_go_by_index():
    assert metrics.ndcg(np.ones((1, 3)), np.zeros((1, 3)), 3) == pytest.approx([0])
    assert metrics.recall(np.ones((2, 3)), np.eye(3)[:2], 1) == pytest.approx([1, 0])


def test_bits_per_byte():
    # Ten tokens of a uniform model over 256, for five bytes.
    assert metrics.bits_per_byte(-10 * math.log(256), 5) == pytest.approx(16)
