"""A corpus of words in the toy vocabulary, their counts one by one, and PROP bound to it."""

from __future__ import annotations

import collections
import functools
import re

import numpy as np

from objectives.base import Setting
from objectives.prop import PROP
from objectives.stopwords import STOPWORDS
from t5like.data.examples import Record
from tests.objectives.conftest import ToyVocabulary

VOCABULARY = ToyVocabulary(framed=True)


class ToyCorpus:
    """200 documents of 1 to 22 words, out of 60 of one or two tokens, some far more frequent.

    None is longer than a piece at rows of 64 tokens: the toy vocabulary writes no space before the
    rest of a word that was cut.
    """

    metadata, fingerprint = {}, "toy corpus"

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        words = [[3 * i] if i % 2 else [3 * i, 3 * i + 1] for i in range(10, 70)]
        share = 1 / np.arange(1, 61)
        documents = []
        for _ in range(200):
            drawn = rng.choice(60, rng.integers(1, 23), p=share / share.sum())
            documents.append([token for w in drawn for token in words[w]])
        self.offsets = np.cumsum([0, *map(len, documents)])
        self.num_documents, self.num_tokens = len(documents), int(self.offsets[-1])
        self._all = np.concatenate(documents).astype(np.uint16)

    def tokens(self, start, stop):
        return self._all[start:stop]

    def record(self, document):
        tokens = self._all[self.offsets[document] : self.offsets[document + 1]].astype(np.int32)
        return Record(tokens, np.zeros(len(tokens), np.int32))


@functools.cache
def toy_corpus():
    """The one that most tests read."""
    return ToyCorpus()


def bind(length=64, cache_dir=None, corpus=None, **fields):
    """PROP(fields) bound to a corpus, by default the toy one."""
    corpus = toy_corpus() if corpus is None else corpus
    setting = Setting("encoder", VOCABULARY, length, corpus=corpus, cache_dir=cache_dir)
    return PROP(**fields).bind(setting)


def brute_force(corpus, max_tokens):
    """(occurrences, documents) of each content word, and the number of documents, one by one."""
    frequency, documents, pieces = collections.Counter(), collections.Counter(), 0
    for i in range(corpus.num_documents):
        whole = corpus.record(i).tokens
        for start in range(0, len(whole), max_tokens):
            text = VOCABULARY.decode(whole[start : start + max_tokens]).lower()
            words = [w for w in re.findall("[a-z]+", text) if w not in STOPWORDS]
            frequency.update(words)
            documents.update(set(words))
            pieces += 1
    return frequency, documents, pieces
