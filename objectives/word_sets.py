"""Sets of words drawn from a document's language model (Ma et al. 2021, section 3.2)."""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from objectives.stopwords import STOPWORDS
from objectives.word_statistics import WordStatistics
from t5like.errors import UserError

# Words drawn beside the document's own where those fill the sampling vocabulary.
_EXTRA = 100


class BagOfWords(NamedTuple):
    """The content words of a document.

    Attributes:
      words: int64 [U], the different ones that are known, by number, rising.
      counts: int64 [U], how often each occurs.
      length: occurrences of all content words, of unknown ones too.
    """

    words: np.ndarray
    counts: np.ndarray
    length: int


class WordSampler:
    """Draws and scores words by a document's unigram language model under Dirichlet smoothing.

    P(w | d) = (count of w in d + mu * P(w)) / (length of d + mu) (Zhai and Lafferty 2004), with
    mu the mean length of a document and P(w) the share of w in the sum of all document
    frequencies. Words are numbered as in `words`.

    Attributes:
      words: the words that can be drawn.
    """

    def __init__(
        self,
        statistics: WordStatistics,
        pattern: str,
        *,
        sampled_words: int,
        subsample_threshold: float,
        subsample_from: int,
        max_tokens: int,
    ):
        """Words of more than max_tokens tokens are left out; for the rest see objectives/prop.py.

        Raises:
          UserError: no word is left.
        """
        lengths = np.diff(statistics.token_offsets)
        fit = np.flatnonzero((lengths > 0) & (lengths <= max_tokens))
        if not len(fit):
            raise UserError(
                f"no word of the corpus fits into {max_tokens} tokens: raise PROP.max_set_tokens "
                "or train.length"
            )
        self._statistics, self._numbers, self._lengths = statistics, fit, lengths[fit]
        self.words = tuple(statistics.words[i] for i in fit)
        self._find = re.compile(pattern).findall
        self._stop, self._unknown = len(fit), len(fit) + 1
        self._index = {word: i for i, word in enumerate(self.words)}
        self._index |= dict.fromkeys(STOPWORDS, self._stop)
        self._mu = statistics.mean_words
        self._background = statistics.documents[fit] / statistics.documents[fit].sum()
        self._cumulative = self._background.cumsum() / self._background.sum()
        self._cumulative[-1] = 1.0
        self._sampled_words = sampled_words
        self._keep = keep_probabilities(
            statistics.frequency[fit], statistics.total_words, subsample_threshold, subsample_from
        )

    def tokens(self, words: np.ndarray) -> np.ndarray:
        """int32, the tokens of words [n], one word after the other."""
        return np.concatenate([self._statistics.tokens(self._numbers[w]) for w in words])

    def find(self, text: str) -> np.ndarray:
        """int64 [n], the text's words in order; past the last number, what cannot be drawn."""
        words = self._find(text.lower())
        numbers = map(self._index.get, words, itertools.repeat(self._unknown))
        return np.fromiter(numbers, np.int64, len(words))

    def count(self, text: str) -> BagOfWords:
        """The words of a document."""
        found = self.find(text)
        words, counts = np.unique(found[found < self._stop], return_counts=True)
        return BagOfWords(words, counts, int(np.count_nonzero(found != self._stop)))

    def probabilities(self, document: BagOfWords, words: np.ndarray) -> np.ndarray:
        """float64 [n], P(w | d) of words [n]; over all words that are known it sums to about 1."""
        counts = np.zeros(len(words))
        if len(document.words):
            at = document.words.searchsorted(words).clip(max=len(document.words) - 1)
            counts = document.counts[at] * (document.words[at] == words)
        return (counts + self._mu * self._background[words]) / (document.length + self._mu)

    def score(self, document: BagOfWords, words: np.ndarray) -> float:
        """Log likelihood of a set; equal for the same words in another order."""
        return math.fsum(np.log(self.probabilities(document, words)).tolist())

    def draw(self, document: BagOfWords, size: int, rng: np.random.Generator) -> np.ndarray:
        """Two sets of `size` words, int64 [2, size], drawn with replacement."""
        own = len(document.words)
        more = self._sampled_words - own if own < self._sampled_words else _EXTRA
        shares = rng.random(more)
        shares.sort()  # neighbours are looked up several times faster
        drawn = self._cumulative.searchsorted(shares, "right")
        candidates = np.concatenate((document.words, drawn))
        candidates.sort()
        again = candidates[1:] == candidates[:-1]
        candidates = np.concatenate((candidates[:1], candidates[1:][~again]))
        # Drawing again until a word is kept is drawing by the product of both probabilities.
        weights = self.probabilities(document, candidates) * self._keep[candidates]
        cumulative = weights.cumsum()
        cumulative /= cumulative[-1]
        cumulative[-1] = 1.0
        return candidates[cumulative.searchsorted(rng.random((2, size)), "right")]

    def fitting(self, sets: np.ndarray, max_tokens: int) -> np.ndarray:
        """Sets [2, n] without their last words, as many of each, so that both fit: [2, <= n]."""
        ends = self._lengths[sets].cumsum(axis=1).max(axis=0)
        return sets[:, : np.count_nonzero(ends <= max_tokens)]


def keep_probabilities(
    frequency: np.ndarray, total: int, threshold: float, known_from: int
) -> np.ndarray:
    """word2vec's subsampling: min(1, sqrt(t / f) + t / f), f a word's share of all words.

    (Mikolov et al. 2013, section 2.3, in the form of the released code.)

    Args:
      frequency: int64 [W], occurrences.
      total: occurrences of all words.
      threshold: t.
      known_from: words of fewer occurrences are always kept.

    Returns:
      float64 [W].
    """
    ratio = threshold * total / frequency
    return np.where(frequency < known_from, 1.0, np.minimum(1.0, np.sqrt(ratio) + ratio))


def length_distribution(mean: float) -> np.ndarray:
    """Cumulative probabilities of 1, 2, ... under a Poisson distribution that is never 0.

    The tail is cut where it weighs less than 1e-12; the last value is 1.
    """
    probability, cumulative = math.exp(-mean), []
    kept = -math.expm1(-mean)
    total, n = 0.0, 0
    while total < 1.0 - 1e-12:
        n += 1
        probability *= mean / n
        total += probability / kept
        cumulative.append(total)
    return np.array([*cumulative[:-1], 1.0])
