"""What a source of text is: documents in a fixed order, cut into any number of shards."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text and what is known about it.

    Attributes:
      text: the text, as it stands in the source.
      metadata: column name -> number, string, bool, None or JSON value.
    """

    text: str
    metadata: Mapping[str, Any] = MappingProxyType({})


class Source:
    """Base of all sources: frozen dataclasses of settings; nothing is read before it is asked for.

    The documents of shard 0, 1, ... of n, one after the other, are the same sequence for every n.
    """

    def num_shards(self) -> int:
        """The number of shards worth working on in parallel (and redoing after a kill)."""
        raise NotImplementedError

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        """The documents of one shard, in order.

        Args:
          shard, num_shards: which of how many; by default the whole source.
          skipped: counts, by file, the broken records that the settings allow to skip.

        Raises:
          UserError: where the text cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the settings and of the content: equal fingerprints mean equal documents."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        raise NotImplementedError
