"""Exact n-gram counts of a corpus, in bounded memory and in parallel.

tokens -> chunks -> sorted runs on disk, one a chunk -> merged by ranges of keys

An n-gram (a, b, c) is the key (a V + b) V + c, so that keys sort as n-grams do and nothing is
hashed. Counts depend neither on the size of the chunks nor on the number of processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from t5like.data.atomic import writing
from t5like.data.processes import die_with_parent
from t5like.errors import UserError

SIZES = (2, 3)
# Keys, up to V ** 3, must lie below the largest int64.
MAX_VOCABULARY = (1 << 21) - 1
# Tokens of a chunk, and entries merged at a time: about 0.3 GB a process.
CHUNK_TOKENS = 4 << 20
RANGE_ENTRIES = 8 << 20
_SAMPLES = 4096

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What `count` found.

    Attributes:
      unigrams: int64 [V], how often each token occurs; 0 for those that were left out.
      totals: n -> number of n-grams counted, with repetitions.
      folder, runs: where the runs lie, and how many there are of each n.
      workers: processes that merge.
      range_entries: entries of runs merged at a time.
    """

    unigrams: np.ndarray
    totals: dict[int, int]
    folder: pathlib.Path
    runs: int
    workers: int = 1
    range_entries: int = RANGE_ENTRIES

    def merged(self, n: int, function: Callable[[np.ndarray, np.ndarray], T]) -> Iterator[T]:
        """`function(keys, counts)` of consecutive ranges of all n-grams, in rising order.

        Args:
          function: takes int64 [k] rising keys and int64 [k] counts. It must be picklable.
        """
        runs = [_Run(self.folder, n, i) for i in range(self.runs)]
        bounds = _range_bounds(runs, self.range_entries)
        merge = functools.partial(_merge, runs, function)
        yield from _map(merge, list(zip(bounds[:-1], bounds[1:], strict=True)), self.workers)


def count(
    corpus: Any,
    excluded: np.ndarray,
    folder: pathlib.Path,
    *,
    workers: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    range_entries: int = RANGE_ENTRIES,
) -> Counts:
    """Counts tokens, bigrams and trigrams within documents.

    Args:
      corpus: see t5like/data/units.py.
      excluded: bool [V], tokens that are no part of an n-gram.
      folder: an empty local directory for the runs, twelve bytes for each n-gram that is
        different within a chunk. The caller deletes it.
      workers: processes; None is one a core. A corpus of one chunk is counted in this process.
      chunk_tokens, range_entries: what is in memory at a time, see `Counts`.

    Raises:
      UserError: the disk is full, or the vocabulary has more than MAX_VOCABULARY ids.
    """
    if len(excluded) > MAX_VOCABULARY:
        raise UserError(
            f"n-grams are counted for vocabularies of up to {MAX_VOCABULARY} ids, not "
            f"{len(excluded)}: use a smaller vocabulary"
        )
    workers = workers or os.cpu_count() or 1
    starts = range(0, max(1, corpus.num_tokens), chunk_tokens)
    work = functools.partial(_count_chunk, corpus, excluded, folder, chunk_tokens)
    unigrams, totals = np.zeros(len(excluded), np.int64), dict.fromkeys(SIZES, 0)
    for chunk_unigrams, chunk_totals in _map(work, list(enumerate(starts)), workers):
        unigrams += chunk_unigrams
        totals = {n: total + chunk_totals[n] for n, total in totals.items()}
    return Counts(unigrams, totals, folder, len(starts), workers, range_entries)


def parts_of(keys: np.ndarray, n: int, base: int) -> np.ndarray:
    """The tokens, int64 [k, n], of the keys [k] of n-grams; base: V."""
    tokens = np.empty((len(keys), n), np.int64)
    for place in reversed(range(n)):
        keys, tokens[:, place] = np.divmod(keys, base)
    return tokens


def keys_of(tokens: np.ndarray, n: int, base: int) -> np.ndarray:
    """The key of the n-gram at each position of tokens [L] that has one, int64 [L - n + 1]."""
    size = max(0, len(tokens) - n + 1)
    keys = tokens[:size].astype(np.int64)
    for place in range(1, n):
        keys *= base
        keys += tokens[place : place + size]
    return keys


# --- one chunk -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """The n-grams of a chunk on disk: rising keys, int64, and their counts, uint32."""

    folder: pathlib.Path
    n: int
    number: int

    def path(self, what: str) -> pathlib.Path:
        return self.folder / f"{self.n}-{self.number:06d}.{what}"

    def write(self, keys: np.ndarray, counts: np.ndarray) -> None:
        for what, values in (("keys", keys), ("counts", counts.astype(np.uint32))):
            with writing(self.path(what)):
                values.tofile(self.path(what))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.path("keys").stat().st_size:
            return np.empty(0, np.int64), np.empty(0, np.uint32)
        return (
            np.memmap(self.path("keys"), np.int64, "r"),
            np.memmap(self.path("counts"), np.uint32, "r"),
        )


def _count_chunk(
    corpus: Any, excluded: np.ndarray, folder: pathlib.Path, size: int, chunk: tuple[int, int]
) -> tuple[np.ndarray, dict[int, int]]:
    """Writes the runs of the n-grams that start in a chunk (number, first token).

    Returns:
      Counts of the chunk's tokens, int64 [V], and its number of n-grams for each n.
    """
    number, start = chunk
    own = min(size, corpus.num_tokens - start)
    tokens = corpus.tokens(start, min(start + own + max(SIZES) - 1, corpus.num_tokens))
    allowed = ~excluded[tokens]
    unigrams = np.bincount(tokens[:own][allowed[:own]], minlength=len(excluded))
    begins = np.zeros(len(tokens), bool)
    low, high = np.searchsorted(corpus.offsets, [start, start + len(tokens)])
    begins[np.asarray(corpus.offsets[low:high]) - start] = True
    totals = {}
    for n in SIZES:
        keys = keys_of(tokens, n, len(excluded))[:own]
        whole = allowed[: len(keys)].copy()
        for place in range(1, n):
            here = slice(place, place + len(keys))
            whole &= allowed[here] & ~begins[here]
        keys = keys[whole]
        totals[n] = len(keys)
        _Run(folder, n, number).write(*_counted(keys, None))
    return unigrams, totals


def _counted(keys: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Different keys, rising, and the sum of each one's counts (None: of ones)."""
    if counts is None:
        keys = np.sort(keys)
    else:
        order = np.argsort(keys)
        keys, counts = keys[order], counts[order]
    edges = np.flatnonzero(np.diff(keys, prepend=-1))
    if counts is None:
        return keys[edges], np.diff(edges, append=len(keys))
    return keys[edges], np.add.reduceat(counts, edges) if len(edges) else counts


# --- the merge -------------------------------------------------------------------------------


def _range_bounds(runs: list[_Run], entries: int) -> list[int]:
    """Keys that cut all runs into ranges of about so many entries; the last bounds all keys."""
    keys = [run.read()[0] for run in runs]
    total = sum(map(len, keys))
    inner = np.empty(0, np.int64)
    if total > entries:
        # A strided sample of each run, of which quantiles are taken.
        stride = max(1, entries // _SAMPLES)
        sample = np.sort(np.concatenate([k[::stride] for k in keys]))
        inner = np.unique(sample[:: max(1, entries // stride)])
    return [0, *inner[inner > 0].tolist(), np.iinfo(np.int64).max]


def _merge(runs: list[_Run], function: Callable, bounds: tuple[int, int]):
    pieces = []
    for run in runs:
        keys, counts = run.read()
        low, high = np.searchsorted(keys, bounds)
        pieces.append((keys[low:high], counts[low:high].astype(np.int64)))
    keys, counts = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return function(*_counted(keys, counts))


# --- processes -------------------------------------------------------------------------------


def _map(function: Callable[[Any], T], items: list, workers: int) -> Iterable[T]:
    """`map` over processes, in order; in this one if there is one item or one worker."""
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # spawn: forking a process that runs JAX or TensorFlow threads can deadlock.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(items))
    with concurrent.futures.ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        try:
            yield from pool.map(function, items)
        except concurrent.futures.process.BrokenProcessPool as e:
            raise UserError(
                "a process that counts n-grams was killed (out of memory?): run again with more "
                "memory, or on fewer cores"
            ) from e
