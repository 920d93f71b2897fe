"""A corpus and objectives small enough to check by eye, for the tests of the index maps."""

from __future__ import annotations

import dataclasses

import numpy as np

from t5like.data.examples import Aligned, Document, Lengths, Seq2Seq, Window


class TinyVocabulary:
    """Token ids only."""

    size, pad_id, eos_id, bos_id = 1000, 0, 1, 0

    def fingerprint(self) -> str:
        return "tiny"


class MemoryCorpus:
    """Documents in memory: token t of the whole corpus is t + 2, so that none repeats."""

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_documents, self.num_tokens = len(lengths), int(self.offsets[-1])
        self.metadata = {"year": np.arange(len(lengths)) + 2000}
        self.fingerprint = f"memory {list(lengths)}"
        self._tokens = np.arange(2, self.num_tokens + 2, dtype=np.uint32)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens
        return self._tokens[start:stop]


def lognormal_corpus(documents: int, seed: int = 0, mean: float = 5.5) -> MemoryCorpus:
    """Documents of C4-like lengths: median about exp(mean), a long tail."""
    rng = np.random.default_rng(seed)
    return MemoryCorpus(np.maximum(1, rng.lognormal(mean, 1.1, documents)).astype(int))


@dataclasses.dataclass(frozen=True)
class Copy:
    """Targets are the record's tokens; no inputs."""

    unit: Window | Document

    def bounds(self, raw_length, rng):
        return Lengths(0, raw_length)

    def corrupt(self, record, rng):
        return Seq2Seq(np.empty(0, np.int32), record.tokens, None, record.documents)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Inputs and targets are the two sides of a random cut; bounds know the cut from the rng."""

    unit: Window | Document
    sees_ahead = True

    def bounds(self, raw_length, rng):
        at = int(rng.integers(raw_length + 1))
        return Lengths(at, raw_length - at)

    def corrupt(self, record, rng):
        at = int(rng.integers(len(record.tokens) + 1))
        tokens, documents = record.tokens, record.documents
        return Seq2Seq(tokens[:at], tokens[at:], documents[:at], documents[at:])


@dataclasses.dataclass(frozen=True)
class Mark:
    """Aligned: every other token, at random, is to be said again."""

    unit: Window | Document
    sees_ahead = True

    def bounds(self, raw_length, rng):
        return Lengths(raw_length)

    def corrupt(self, record, rng):
        weights = (rng.random(len(record.tokens)) < 0.5).astype(np.float32)
        return Aligned(record.tokens, record.tokens, weights, documents=record.documents)
