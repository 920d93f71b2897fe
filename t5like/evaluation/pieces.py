"""Pieces of held-out text, each with a stretch of it that a model is to say."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator

import numpy as np

from t5like.data.sources.base import Source

_GAP = re.compile(r"(?<=\S)\s")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text in three parts; `hidden` begins with the space before its first word.

    Attributes:
      before, hidden, after: joined they are the text.
    """

    before: str
    hidden: str
    after: str

    @property
    def hidden_bytes(self) -> int:
        """Of `hidden` in UTF-8."""
        return len(self.hidden.encode("utf-8", "replace"))


@functools.lru_cache(maxsize=16)
def texts(source: Source, characters: int, documents: int, seed: int) -> tuple[str, ...]:
    """Stretches of a source's text, in an order that depends on (seed, text) alone.

    Args:
      source: a frozen dataclass of settings.
      characters: of a stretch, at most; it ends before a space.
      documents: how many of the source's documents are read, from the first.
      seed: of the order.
    """
    chosen = itertools.islice(source.documents(), documents)
    found = {piece for document in chosen for piece in _cut(document.text, characters)}
    return tuple(sorted(found, key=lambda text: _number(seed, text)))


def _cut(text: str, characters: int) -> Iterator[str]:
    """Consecutive stretches; the last one, which is shorter, and long runs without space go."""
    start = 0
    while len(text) - start > characters:
        ends = [match.start() for match in _GAP.finditer(text, start + 1, start + characters + 1)]
        if ends:
            yield text[start : ends[-1]]
        start = ends[-1] if ends else start + characters


def _number(seed: int, text: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hide_middle(text: str, characters: int, seed: int) -> Piece | None:
    """Hides whole words in the middle, at least `characters` of them if the text has that many.

    Where the stretch starts is drawn by (seed, text); at least a word stays on both sides.
    None: the text has fewer than three words.
    """
    gaps = _gaps(text)
    if len(gaps) < 2:
        return None
    last = max(int(np.searchsorted(gaps, gaps[-1] - characters, "right")), 1)
    start = gaps[_number(seed, text) % last]
    stop = gaps[min(np.searchsorted(gaps, start + characters), len(gaps) - 1)]
    return Piece(text[:start], text[start:stop], text[stop:])


def hide_end(text: str, share: float) -> Piece | None:
    """Hides the last `share` of the text, from a space on; None: it has one word."""
    gaps = _gaps(text)
    if not len(gaps):
        return None
    cut = gaps[min(np.searchsorted(gaps, (1.0 - share) * len(text)), len(gaps) - 1)]
    return Piece(text[:cut], text[cut:], "")


def _gaps(text: str) -> np.ndarray:
    """Where a space follows a word, rising."""
    return np.array([match.start() for match in _GAP.finditer(text)], np.int64)
