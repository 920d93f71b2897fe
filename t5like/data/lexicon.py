"""A lexicon of n-grams: found by t-test, looked up, and used to cut tokens into units.

As ERNIE-Gram has it (Xiao et al. 2021, "ERNIE-Gram: Pre-Training with Explicitly N-Gram Masked
Language Modeling for Natural Language Understanding", section 3.5 and appendix A).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import tempfile
import time
import zipfile
from typing import Any, NamedTuple

import numpy as np

from t5like.data import ngrams
from t5like.data.atomic import local, replacing, writing

_logger = logging.getLogger(__name__)
# Part of the cached lexicon's name: raise it when equal settings give another lexicon.
_VERSION = 1
_NO_KEY = np.iinfo(np.int64).max


class Units(NamedTuple):
    """Tokens cut into units, each a token or an n-gram of the lexicon.

    Attributes:
      starts, sizes: int64 [U], where each unit starts and how many tokens it has.
      ids: int32 [U], in <V_F, V_N>: a token's own id, or V + the n-gram's number.
    """

    starts: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Lexicon:
    """Bigrams and trigrams, numbered from 0: the bigrams first, both in the order of their tokens.

    Attributes:
      base: V, the size of the vocabulary.
      bigrams, trigrams: int64, rising keys (see t5like/data/ngrams.py).
    """

    base: int
    bigrams: np.ndarray
    trigrams: np.ndarray

    def __len__(self) -> int:
        return len(self.bigrams) + len(self.trigrams)

    def tokens(self, unit: int) -> np.ndarray:
        """The tokens, int64 [1 to 3], of a unit's id."""
        if unit < self.base:
            return np.array([unit], np.int64)
        number = unit - self.base
        if number < len(self.bigrams):
            return ngrams.parts_of(self.bigrams[[number]], 2, self.base)[0]
        return ngrams.parts_of(self.trigrams[[number - len(self.bigrams)]], 3, self.base)[0]

    def cut(self, tokens: np.ndarray, documents: np.ndarray | None = None) -> Units:
        """Cuts tokens [L] into the fewest units; of equally few, the longest ones come first.

        This is maximum matching in its exact form. Taking the longest n-gram at each place does
        not always give the fewest: a b c d e is [ab][cde], not [abc][d][e].

        Args:
          documents: int [L], document of each token, which no unit crosses; None: one document.
        """
        pairs = _numbers(self._padded[0], ngrams.keys_of(tokens, 2, self.base))
        triples = _numbers(self._padded[1], ngrams.keys_of(tokens, 3, self.base))
        if documents is not None:
            pairs[documents[1:] != documents[:-1]] = -1
            triples[documents[2:] != documents[:-2]] = -1
        starts, sizes = _fewest(pairs >= 0, triples >= 0, len(tokens))
        ids = tokens[starts].astype(np.int32)
        for n, numbers, first in ((2, pairs, 0), (3, triples, len(self.bigrams))):
            units = (sizes == n).nonzero()[0]
            ids[units] = self.base + first + numbers[starts[units]]
        return Units(starts, sizes, ids)

    @functools.cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys with one more that none has, so that a search never ends outside."""
        return tuple(np.append(keys, _NO_KEY) for keys in (self.bigrams, self.trigrams))


def _numbers(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 [k], the place of each wanted key [k] in rising keys, -1 where it is not there."""
    found = keys.searchsorted(wanted)
    found[keys[found] != wanted] = -1
    return found


def _fewest(pairs: np.ndarray, triples: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the fewest units that cover `length` tokens.

    The dynamic programme runs over plain lists, from the last token to the first: at the lengths
    of rows that is several times as fast as a number of passes over arrays.

    Args:
      pairs, triples: bool [length - 1] and [length - 2], whether an n-gram starts there.
    """
    pairs, triples = (x.tolist() + [False] * (length - len(x)) for x in (pairs, triples))
    sizes = [1] * length
    after, after_pair, after_triple = 0, 0, 0  # units needed from one, two, three tokens on
    for at in range(length - 1, -1, -1):
        fewest = after
        if pairs[at] and after_pair <= fewest:
            fewest, sizes[at] = after_pair, 2
        if triples[at] and after_triple <= fewest:
            fewest, sizes[at] = after_triple, 3
        after_triple, after_pair, after = after_pair, after, fewest + 1
    starts, at = [], 0
    while at < length:
        starts.append(at)
        at += sizes[at]
    starts = np.array(starts, np.int64)
    return starts, np.diff(starts, append=length)


# --- which n-grams ---------------------------------------------------------------------------


def t_scores(counts: np.ndarray, total: int, independent: np.ndarray) -> np.ndarray:
    """How far n-grams are from chance: t = (p - p') / sqrt(p (1 - p) / N) (appendix A).

    Args:
      counts: [k], occurrences of each n-gram.
      total: N, occurrences of all n-grams of this size.
      independent: float64 [k], p', the product of the frequencies of an n-gram's tokens.

    Returns:
      float64 [k].
    """
    p = counts / total
    return (p - independent) / np.sqrt(np.maximum(p * (1 - p), 1 / total**2) / total)


def build(
    corpus: Any,
    vocabulary: Any,
    *,
    bigrams: int = 200_000,
    trigrams: int = 100_000,
    min_count: int = 5,
    cache_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    chunk_tokens: int = ngrams.CHUNK_TOKENS,
) -> Lexicon:
    """The n-grams of a corpus that are furthest from chance, or those found before.

    N-grams lie within one document and hold no special token. Only positive scores count.

    Args:
      corpus: see t5like/data/units.py.
      vocabulary: `size`, `special_ids` and `fingerprint()` are used.
      bigrams, trigrams: most of each; the paper has about 200,000 and 100,000.
      min_count: fewest occurrences.
      cache_dir: a local directory where the lexicon is kept, and runs while it is built; None:
        it is not kept.
      workers, chunk_tokens: see t5like.data.ngrams.count; the result does not depend on them.
    """
    key = [_VERSION, corpus.fingerprint, vocabulary.fingerprint(), bigrams, trigrams, min_count]
    name = f"lexicon-{hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()}"
    path = None
    if cache_dir is not None:
        path = local(cache_dir) / f"{name}.npz"
        known = _read(path, vocabulary.size)
        if known is not None:
            return known
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    excluded = np.zeros(vocabulary.size, bool)
    excluded[vocabulary.special_ids] = True
    began = time.monotonic()
    folder = None if path is None else path.parent
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as runs:
        counts = ngrams.count(
            corpus, excluded, pathlib.Path(runs), workers=workers, chunk_tokens=chunk_tokens
        )
        chosen = {n: _best(counts, n, most, min_count) for n, most in ((2, bigrams), (3, trigrams))}
    lexicon = Lexicon(vocabulary.size, chosen[2], chosen[3])
    seconds = time.monotonic() - began
    _logger.info(
        "a lexicon of %d bigrams and %d trigrams from %d tokens in %.0f s (%.1f M tokens/s)",
        len(chosen[2]), len(chosen[3]), corpus.num_tokens, seconds,
        corpus.num_tokens / max(seconds, 1e-9) / 1e6,
    )  # fmt: skip
    if path is not None:
        with replacing(path) as stream:
            np.savez(stream, bigrams=chosen[2], trigrams=chosen[3])
    return lexicon


def _read(path: pathlib.Path, vocabulary_size: int) -> Lexicon | None:
    """What the file holds; None where there is none, or a damaged one, to be written again."""
    try:
        with np.load(path) as arrays:
            return Lexicon(vocabulary_size, arrays["bigrams"], arrays["trigrams"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _best(counts: ngrams.Counts, n: int, most: int, min_count: int) -> np.ndarray:
    """Rising keys, at most so many, of the n-grams with the highest scores."""
    tokens = max(1, int(counts.unigrams.sum()))
    score = functools.partial(
        _best_of_range, n, most, min_count, counts.unigrams / tokens, counts.totals[n]
    )
    keys, scores = np.empty(0, np.int64), np.empty(0)
    for more_keys, more_scores in counts.merged(n, score):
        keys, scores = np.concatenate([keys, more_keys]), np.concatenate([scores, more_scores])
        keys, scores = _highest(keys, scores, most)
    return np.sort(keys)


def _best_of_range(n, most, min_count, frequencies, total, keys, counts):
    """(keys, scores) of a range's best; what `Counts.merged` asks of each range."""
    enough = counts >= min_count
    keys, counts = keys[enough], counts[enough]
    independent = frequencies[ngrams.parts_of(keys, n, len(frequencies))].prod(axis=1)
    scores = t_scores(counts, max(1, total), independent)
    return _highest(keys[scores > 0], scores[scores > 0], most)


def _highest(keys: np.ndarray, scores: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The `most` best, best first; of equal scores, the smaller keys."""
    order = np.lexsort((keys, -scores))[:most]
    return keys[order], scores[order]
