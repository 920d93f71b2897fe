"""The documents of a record, one by one: where they lie, and a record with some rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Segments(NamedTuple):
    """What a record holds of each of its D documents.

    Attributes:
      starts, stops: int64 [D], document d is the half-open range starts[d]:stops[d].
      ends: int64 [D], where its text ends: before its EOS, if that is in the record.
    """

    starts: np.ndarray
    ends: np.ndarray
    stops: np.ndarray


def segments(tokens: np.ndarray, documents: np.ndarray | None, eos_id: int) -> Segments:
    """Finds the documents of a record.

    Args:
      tokens: int32 [R].
      documents: int32 [R], or None: there is one document, which may be empty.
      eos_id: what closes a document.
    """
    edges = np.array([0, len(tokens)])
    if documents is not None:
        changes = (documents[1:] != documents[:-1]).nonzero()[0] + 1
        edges = np.concatenate((edges[:1], changes, edges[1:]))
    starts, stops = edges[:-1], edges[1:]
    closed = tokens[stops - 1] == eos_id if len(tokens) else 0
    return Segments(starts, stops - closed, stops)


def rewritten(
    tokens: np.ndarray,
    documents: np.ndarray | None,
    found: Segments,
    texts: Mapping[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
    """A record with some of its documents replaced.

    Args:
      tokens, documents, found: as in `segments` and from it.
      texts: number of a document, rising -> int32 [n], what to put in its place, EOS included.

    Returns:
      (tokens [R'], documents [R'] or None as given).
    """
    pieces, sizes, at = [], found.stops - found.starts, 0
    for d, text in texts.items():
        pieces += [tokens[at : found.starts[d]], text]
        sizes[d] = len(text)
        at = found.stops[d]
    changed = np.concatenate([*pieces, tokens[at:]])
    if documents is not None:
        documents = documents[found.starts].repeat(sizes)
    return changed, documents
