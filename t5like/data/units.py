"""How a corpus is cut into numbered records, by arithmetic on its offsets.

Only the offsets are looked at to number the units; tokens are read for one record at a time. In
one pass over the units every token of the corpus comes exactly once.
"""

from __future__ import annotations

import bisect
import functools
from typing import Any, Protocol

import numpy as np

from t5like.data.examples import Document, Record, Unit, Window


class Corpus(Protocol):
    """What is asked of a corpus (see t5like/data/corpus.py).

    Attributes:
      num_documents, num_tokens: sizes.
      offsets: int64 [num_documents + 1], where each document starts.
      metadata: {column: array [num_documents]}.
    """

    num_documents: int
    num_tokens: int
    offsets: np.ndarray
    metadata: dict[str, Any]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] of the concatenated documents."""


class Units(Protocol):
    """Numbered records of a corpus."""

    def __len__(self) -> int: ...

    def raw_lengths(self, units: np.ndarray) -> np.ndarray:
        """int64 [n], tokens of each of the units [n], without reading them."""

    def record(self, unit: int) -> Record:
        """Reads one unit."""


def cut(corpus: Corpus, unit: Unit) -> Units:
    """Numbers the records of `corpus` as an objective's `unit` asks."""
    if isinstance(unit, Window):
        return _Windows(corpus, unit)
    if isinstance(unit, Document):
        return _Pieces(corpus, unit)
    raise ValueError(f"unknown unit {unit!r}")


class _Windows:
    """Windows over the stream of all documents, each followed by the separator if there is one."""

    def __init__(self, corpus: Corpus, unit: Window):
        self._corpus = corpus
        self._offsets = np.asarray(corpus.offsets)
        self._size = unit.raw_length
        self._separator = unit.separator
        self._extra = 0 if unit.separator is None else 1
        self._total = corpus.num_tokens + self._extra * corpus.num_documents

    def __len__(self) -> int:
        return -(-self._total // self._size)

    def raw_lengths(self, units: np.ndarray) -> np.ndarray:
        return np.minimum(self._size, self._total - np.asarray(units, np.int64) * self._size)

    def record(self, unit: int) -> Record:
        start = unit * self._size
        stop = min(start + self._size, self._total)
        first, last = self._document_at(start), self._document_at(stop - 1)
        documents = np.zeros(stop - start, np.int32)
        if first < last or self._extra:
            # Where the documents of this window end in the stream.
            numbers = np.arange(first + 1, last + 2)
            ends = self._offsets[first + 1 : last + 2] + self._extra * numbers
            documents[ends[:-1] - start] = 1  # once also where empty documents end there
            documents = documents.cumsum(dtype=np.int32)
            tokens = self._tokens(start, stop, first, ends)
        else:
            tokens = self._corpus.tokens(start, stop).astype(np.int32)
        return Record(tokens, documents, _row(self._corpus, first))

    def _tokens(self, start: int, stop: int, first: int, ends: np.ndarray) -> np.ndarray:
        """int32 tokens of stream positions start..stop-1; ends: of its documents, in the stream."""
        if not self._extra:
            return self._corpus.tokens(start, stop).astype(np.int32)
        separators = ends[ends <= stop] - 1 - start
        is_token = np.ones(stop - start, bool)
        is_token[separators] = False
        tokens = np.full(stop - start, self._separator, np.int32)
        # `first` separators stand before this window.
        begin = start - first
        tokens[is_token] = self._corpus.tokens(begin, begin + len(tokens) - len(separators))
        return tokens

    def _document_at(self, position: int) -> int:
        """The document that a position of the stream belongs to (never one without tokens)."""
        if not self._extra:
            return int(self._offsets.searchsorted(position, "right")) - 1
        documents = range(len(self._offsets))
        return bisect.bisect_right(documents, position, key=self._stream_offset) - 1

    def _stream_offset(self, document: int) -> int:
        return int(self._offsets[document]) + document


class _Pieces:
    """Documents; one longer than the maximum is cut into consecutive pieces."""

    def __init__(self, corpus: Corpus, unit: Document):
        self._corpus = corpus
        self._offsets = np.asarray(corpus.offsets)
        self._size = unit.max_raw_length

    @functools.cached_property
    def _first_piece(self) -> np.ndarray:
        """int64 [num_documents + 1], pieces before each document; empty documents have none."""
        pieces = -(-np.diff(self._offsets) // self._size)
        return np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return int(self._first_piece[-1])

    def _spans(self, units):
        document = self._first_piece.searchsorted(units, "right") - 1
        start = self._offsets[document] + (units - self._first_piece[document]) * self._size
        return document, start, np.minimum(start + self._size, self._offsets[document + 1])

    def raw_lengths(self, units: np.ndarray) -> np.ndarray:
        _, start, stop = self._spans(np.asarray(units, np.int64))
        return stop - start

    def record(self, unit: int) -> Record:
        document, start, stop = (int(x) for x in self._spans(unit))
        tokens = self._corpus.tokens(start, stop).astype(np.int32)
        documents = np.zeros(stop - start, np.int32)
        ends = stop == int(self._offsets[document + 1])
        return Record(tokens, documents, _row(self._corpus, document), ends)


def _row(corpus: Corpus, document: int) -> dict[str, Any]:
    return {name: column[document] for name, column in corpus.metadata.items()}
