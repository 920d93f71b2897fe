"""How often the words of a corpus occur, counted in one pass and kept."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from objectives.stopwords import STOPWORDS
from t5like.data.atomic import local, replacing, writing
from t5like.data.examples import Document
from t5like.data.processes import die_with_parent
from t5like.data.units import cut
from t5like.errors import UserError

# Part of the cache's name: raise it when equal settings give other numbers.
_VERSION = 1
_CHUNK_TOKENS = 1 << 20
# Below this, starting processes takes longer than they save.
_PARALLEL_TOKENS = 1 << 23


class WordStatistics(NamedTuple):
    """The content words of a corpus (no stopwords), those that are rare left out.

    Attributes:
      words: W of them, lower-cased, rising.
      frequency: int64 [W], occurrences in the corpus.
      documents: int64 [W], documents that have the word.
      total_words: occurrences of all content words, of rare ones too.
      mean_words: content words of a document, on average.
      token_offsets: int64 [W + 1]; word i is tokens token_offsets[i]:token_offsets[i + 1] of
      token_ids: int32, the words in the vocabulary's tokens, each after a space.
    """

    words: tuple[str, ...]
    frequency: np.ndarray
    documents: np.ndarray
    total_words: int
    mean_words: float
    token_offsets: np.ndarray
    token_ids: np.ndarray

    def tokens(self, word: int) -> np.ndarray:
        """int32, the tokens of a word."""
        return self.token_ids[self.token_offsets[word] : self.token_offsets[word + 1]]


class Counting(NamedTuple):
    """What is counted.

    Attributes:
      max_tokens: a longer document is cut into consecutive pieces, each a document of its own.
      pattern: regular expression of a word, in lower-cased text.
      min_frequency: occurrences in the corpus below which a word is left out, ...
      min_words: ... unless fewer words than these would be left; then the most frequent stay.
    """

    max_tokens: int
    pattern: str
    min_frequency: int
    min_words: int


def word_statistics(
    corpus: Any,
    vocabulary: Any,
    counting: Counting,
    cache_dir: str | os.PathLike | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> WordStatistics:
    """Counts the words of a corpus, or reads what was counted before.

    The result depends on corpus, vocabulary and `counting` alone, not on the processes.

    Args:
      corpus: see t5like/data/units.py; its `fingerprint` names the cached file.
      vocabulary: decodes documents and encodes words.
      cache_dir: a local directory, or None to keep nothing.
      workers: processes; None: one a core, or this one alone for a small corpus.
      progress: whether to show a progress bar (only where the output is a terminal).

    Raises:
      UserError: the corpus has no content word, or the file cannot be written.
    """
    path = None
    if cache_dir is not None:
        path = local(cache_dir) / f"word_statistics-{_key(corpus, vocabulary, counting)}.npz"
        if (statistics := _read(path)) is not None:
            return statistics
    counts = _counts(corpus, vocabulary, counting, workers, progress)
    statistics = _selected(*counts, vocabulary, counting)
    if path is not None:
        _write(path, statistics)
    return statistics


# --- counting --------------------------------------------------------------------------------

Count = tuple[collections.Counter, collections.Counter, int]


def _counts(corpus, vocabulary, counting: Counting, workers: int | None, progress: bool) -> Count:
    """Occurrences of every word, documents of every word, documents."""
    frequency, documents, pieces = collections.Counter(), collections.Counter(), 0
    if workers is None:
        workers = (os.cpu_count() or 1) if corpus.num_tokens >= _PARALLEL_TOKENS else 1
    units = len(cut(corpus, Document(counting.max_tokens)))
    # Few enough that each may look through the corpus's offsets for its first document.
    chunks = max(1, min(corpus.num_tokens // _CHUNK_TOKENS, 32 * workers))
    edges = [units * i // chunks for i in range(chunks + 1)]
    count = functools.partial(_count, corpus, vocabulary, counting)
    for part in _progress_bar(_run(count, edges, workers), chunks, progress):
        frequency.update(part[0])
        documents.update(part[1])
        pieces += part[2]
    return frequency, documents, pieces


def _count(corpus, vocabulary, counting: Counting, first: int, last: int) -> Count:
    """Of documents first..last-1, stopwords among the words."""
    units = cut(corpus, Document(counting.max_tokens))
    find = re.compile(counting.pattern).findall
    frequency, documents = collections.Counter(), collections.Counter()
    for unit in range(first, last):
        words = find(vocabulary.decode(units.record(unit).tokens).lower())
        frequency.update(words)
        documents.update(set(words))
    return frequency, documents, last - first


def _run(count, edges: list[int], workers: int) -> Iterator[Count]:
    if min(workers, len(edges) - 1) == 1:
        yield from map(count, edges[:-1], edges[1:])
        return
    # spawn: forking a process that runs JAX or TensorFlow threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        yield from pool.map(count, edges[:-1], edges[1:])


def _progress_bar(parts: Iterator[Count], total: int, show: bool) -> Iterator[Count]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        parts, "counting words", total, console=console, disable=not (show and console.is_terminal)
    )


def _selected(frequency, documents, pieces: int, vocabulary, counting: Counting) -> WordStatistics:
    """The statistics of the words that are frequent enough."""
    for word in STOPWORDS:
        del frequency[word]
    if not frequency:
        raise UserError(
            f"the corpus has no word of the pattern {counting.pattern!r} that is not a stopword: "
            "set PROP.word_pattern to what a word of this corpus looks like"
        )
    occurrences = np.sort(np.fromiter(frequency.values(), np.int64, len(frequency)))
    least = min(counting.min_frequency, occurrences[-min(counting.min_words, len(frequency))])
    words = tuple(sorted(word for word, count in frequency.items() if count >= least))
    tokens = vocabulary.encode_batch([f" {word}" for word in words])
    return WordStatistics(
        words=words,
        frequency=np.array([frequency[word] for word in words], np.int64),
        documents=np.array([documents[word] for word in words], np.int64),
        total_words=int(occurrences.sum()),
        mean_words=float(occurrences.sum()) / pieces,
        token_offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        token_ids=np.concatenate(tokens).astype(np.int32),
    )


# --- the file --------------------------------------------------------------------------------


def _key(corpus, vocabulary, counting: Counting) -> str:
    parts = (_VERSION, corpus.fingerprint, vocabulary.fingerprint(), counting, sorted(STOPWORDS))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _write(path: pathlib.Path, statistics: WordStatistics) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    words = np.frombuffer("\0".join(statistics.words).encode(), np.uint8)
    with replacing(path) as stream:
        np.savez(stream, **statistics._replace(words=words)._asdict())


def _read(path: pathlib.Path) -> WordStatistics | None:
    """What the file holds; None where there is none, or a damaged one, to be written again."""
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in WordStatistics._fields}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return WordStatistics(
        **arrays
        | {
            "words": tuple(arrays["words"].tobytes().decode().split("\0")),
            "total_words": int(arrays["total_words"]),
            "mean_words": float(arrays["mean_words"]),
        }
    )
