"""Packing of variable-length examples into rows, planned in fixed groups from bounds alone.

Examples are taken in groups of a fixed size; each group is packed by itself, so that row ->
examples needs only the plan of one group and the number of rows of the groups before it. Those
counts are kept in a file that only grows and can be lost at no cost but time.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import os
import pathlib
import threading
from collections.abc import Callable

import numpy as np

from t5like.data.rng import generator

_PLANS_KEPT = 8


def pack(sizes: np.ndarray, capacity: np.ndarray) -> list[np.ndarray]:
    """Best-fit decreasing bin packing in as many dimensions as `capacity` has.

    Args:
      sizes: int64 [examples, dimensions], each within capacity.
      capacity: int64 [dimensions]; a dimension of capacity 0 is not used.

    Returns:
      Rows, each an array of example numbers in rising order; a row's sizes sum within capacity.
    """
    used = np.flatnonzero(capacity)
    sizes, capacity = sizes[:, used], capacity[used]
    fractions = sizes / capacity
    smallest = sizes.min(axis=0)
    alone = (sizes + smallest > capacity).any(axis=1)
    rows = [[example] for example in alone.nonzero()[0]]
    order = np.argsort(-fractions.max(axis=1), kind="stable")
    room = np.empty(sizes.shape, np.int64)  # of the open rows, the first `open_rows`
    slack = np.empty(len(sizes))
    owner = np.empty(len(sizes), np.int64)
    open_rows = 0
    for example in order[~alone[order]]:
        size = sizes[example]
        fits = (room[:open_rows] >= size).all(axis=1).nonzero()[0]
        if fits.size:
            place = fits[slack[fits].argmin()]
        else:
            place, open_rows = open_rows, open_rows + 1
            room[place], slack[place], owner[place] = capacity, len(used), len(rows)
            rows.append([])
        rows[owner[place]].append(example)
        room[place] -= size
        slack[place] -= fractions[example].sum()
        if (room[place] < smallest).any():  # nothing will fit any more: close it
            open_rows -= 1
            for column in (room, slack, owner):
                column[place] = column[open_rows]
    return [np.sort(row) for row in rows]


class PackedRows:
    """Row number -> the examples packed into it, for an endless stream of examples.

    Args:
      sizes: group number -> int64 [group_size, 2], upper bounds (inputs, targets) of the examples
        group * group_size ... ; must be a pure function.
      group_size: examples a group.
      capacity: (length, targets_length) of a row.
      seed: the seed of the order of rows within a group.
      cache: the file of cumulative row counts, or None. Its name must identify everything that
        the plan depends on.
    """

    def __init__(
        self,
        sizes: Callable[[int], np.ndarray],
        group_size: int,
        capacity: tuple[int, int],
        seed: int,
        cache: pathlib.Path | None = None,
    ):
        self._sizes = sizes
        self._group_size = group_size
        self._capacity = np.array(capacity, np.int64)
        self._seed = seed
        self._cache = cache
        self._ends = _read_counts(cache) if cache else []  # rows up to and with each group
        self._plans: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def locate(self, row: int) -> tuple[int, int]:
        """(group, row within the group) of a row; plans the groups up to it if it must."""
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                self._plan(len(self._ends))
            group = bisect.bisect_right(self._ends, row)
        return group, row - (self._ends[group - 1] if group else 0)

    def rows(self, group: int) -> list[np.ndarray]:
        """The group's rows, each an array of example numbers within the group, rising."""
        with self._lock:
            return self._plan(group)

    def _plan(self, group: int) -> list[np.ndarray]:
        if group in self._plans:
            return self._plans[group]
        rows = pack(self._sizes(group), self._capacity)
        # Packing puts the longest examples into the first rows; batches should not be sorted so.
        order = generator(self._seed, "packed rows", group).permutation(len(rows))
        self._plans[group] = [rows[i] for i in order]
        while len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        if group == len(self._ends):
            self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))
            if self._cache:
                _write_count(self._cache, group, self._ends[-1])
        return self._plans[group]


# Several processes may write one file without a lock: the count of a group is the same whoever
# plans it, and stands at its own place.


def _read_counts(cache: pathlib.Path) -> list[int]:
    """The counts that are whole and rising; a torn or foreign tail is left for planning again."""
    try:
        data = cache.read_bytes()
    except OSError:
        return []
    counts = np.frombuffer(data[: len(data) // 8 * 8], "<i8")
    good = np.diff(counts, prepend=0) > 0
    return counts[: len(counts) if good.all() else int(good.argmin())].tolist()


def _write_count(cache: pathlib.Path, group: int, count: int) -> None:
    # A count that cannot be written (disk full, read-only) is only planned again another time.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(cache, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, np.array(count, "<i8").tobytes(), 8 * group)
        finally:
            os.close(handle)
