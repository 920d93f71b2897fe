"""What is measured on: texts with labels, and queries with documents. Data alone, no model.

A loader is a frozen dataclass of settings; `load` reads it once and gives equal data on every
call. Any number of measures may be taken on one task.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from t5like.data.rng import generator
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationTask:
    """Texts with one of C labels each; no text is on both sides.

    Attributes:
      labels: names of the C classes.
      train_texts, test_texts: n texts each.
      train_labels, test_labels: int32 [n], below C.
    """

    labels: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: np.ndarray
    test_texts: tuple[str, ...]
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Queries for which documents are to be ranked.

    Attributes:
      documents: N texts, the same for all queries.
      queries: Q texts that are measured.
      gains: of each query, index of a document -> gain above 0; the others have 0.
      train_queries, train_gains: further queries of the same kind, to learn from.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    gains: tuple[Mapping[int, float], ...]
    train_queries: tuple[str, ...] = ()
    train_gains: tuple[Mapping[int, float], ...] = ()

    def gain_matrix(self) -> np.ndarray:
        """float32 [Q, N] of `gains`."""
        matrix = np.zeros((len(self.queries), len(self.documents)), np.float32)
        for row, gains in zip(matrix, self.gains, strict=True):
            row[list(gains)] = list(gains.values())
        return matrix


class ClassificationLoader:
    """Base of what loads a ClassificationTask."""

    def load(self) -> ClassificationTask:
        """The task; raises UserError where its data cannot be read or is too small."""
        return self._task

    @functools.cached_property
    def _task(self) -> ClassificationTask:
        raise NotImplementedError


class RetrievalLoader:
    """Base of what loads a RetrievalTask."""

    def load(self) -> RetrievalTask:
        """The task; raises UserError where its data cannot be read or is too small."""
        return self._task

    @functools.cached_property
    def _task(self) -> RetrievalTask:
        raise NotImplementedError


Labelled = Sequence[tuple[str, object]]


def classification(train: Labelled, test: Labelled, who: str) -> ClassificationTask:
    """A task from (text, label) pairs; a text that came before is passed over.

    Raises:
      UserError: a side is empty, or the train side has a single label.
    """
    seen: set[str] = set()
    sides = [[pair for pair in side if _new(pair[0], seen)] for side in (train, test)]
    kinds = sorted({label for _, label in sides[0]}, key=str)
    if len(kinds) < 2 or not sides[1]:
        raise UserError(
            f"{who} has {len(sides[0])} train and {len(sides[1])} test texts of {len(kinds)} "
            "labels: it needs at least two labels and a test text"
        )
    number = {label: k for k, label in enumerate(kinds)}
    strange = sorted({str(label) for _, label in sides[1] if label not in number})
    if strange:
        raise UserError(f"{who} has test texts labelled {strange[0]}, which no train text is")
    columns = []
    for side in sides:
        columns += [tuple(text for text, _ in side)]
        columns += [np.array([number[label] for _, label in side], np.int32)]
    return ClassificationTask(tuple(map(str, kinds)), *columns)


def _new(text: str, seen: set[str]) -> bool:
    """Whether a text comes for the first time."""
    if text in seen:
        return False
    seen.add(text)
    return True


def shuffled(count: int, stream: str) -> np.ndarray:
    """A permutation of range(count) that is the same on every call."""
    return generator(0, f"tasks/{stream}").permutation(count)
