"""Requests of any size in a few array shapes, so that a decoder compiles a few times only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def bucket(size: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least `size` and `minimum`."""
    return 1 << (max(size, minimum, 1) - 1).bit_length()


def batches(
    lengths: Sequence[int | tuple[int, ...]], batch_size: int, minimum: int = 16
) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
    """Groups requests whose lengths round up alike.

    Args:
      lengths: of each request; a tuple where it has several parts (inputs, targets).
      batch_size: most requests of a batch.
      minimum: shortest bucket of a length.

    Yields:
      (bucketed lengths, indices, count): the indices of a batch are padded to a power of two by
      repeating the last one; the first `count` are real. Every request comes exactly once.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, parts in enumerate(lengths):
        parts = parts if isinstance(parts, tuple) else (parts,)
        groups.setdefault(tuple(bucket(part, minimum) for part in parts), []).append(index)
    for shape, members in sorted(groups.items()):
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            padding = [chosen[-1]] * (bucket(len(chosen)) - len(chosen))
            yield shape, np.array(chosen + padding, np.int32), len(chosen)
