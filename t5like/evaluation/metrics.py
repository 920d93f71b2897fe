"""Figures of merit: of rankings, of classifications, of likelihoods. Plain functions of arrays."""

from __future__ import annotations

import math

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries of two int [n]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def bits_per_byte(log_likelihood: float, text_bytes: int) -> float:
    """Bits that a code made from the model spends on a byte of text.

    Args:
      log_likelihood: summed natural log-probability of the text's tokens.
      text_bytes: of the text in UTF-8.
    """
    return -log_likelihood / math.log(2) / text_bytes


def ndcg(scores: np.ndarray, gains: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain at rank k, float64 [Q].

    Järvelin and Kekäläinen 2002, section 2.2, with the gain itself (not 2^gain - 1) over
    log2(rank + 1), as trec_eval has it.

    Args:
      scores: [Q, N], higher first; of equal scores the document with the lower index.
      gains: [Q, N], 0 for what is not relevant; a query without gain counts 0.
      k: rank at which the list is cut.
    """
    ideal = _discounted(-np.sort(-gains, axis=1), k)
    return np.divide(_discounted(_ranked(scores, gains), k), ideal, where=ideal > 0,
                     out=np.zeros(len(gains)))  # fmt: skip


def recall(scores: np.ndarray, gains: np.ndarray, k: int) -> np.ndarray:
    """Share of each query's relevant documents among its first k, float64 [Q]; see `ndcg`."""
    found = (_ranked(scores, gains)[:, :k] > 0).sum(axis=1)
    relevant = (gains > 0).sum(axis=1)
    return found / np.maximum(relevant, 1)


def _ranked(scores: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Each row's gains in the order of its scores."""
    return np.take_along_axis(gains, np.argsort(-scores, axis=1, kind="stable"), axis=1)


def _discounted(gains: np.ndarray, k: int) -> np.ndarray:
    """Sum over the first k ranks of gain / log2(rank + 1), ranks from 1."""
    gains = gains[:, :k].astype(np.float64)
    return gains @ (1.0 / np.log2(np.arange(gains.shape[1]) + 2.0))
