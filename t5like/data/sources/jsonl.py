"""JSON lines: one object a line, its text in a named field, the rest as metadata columns."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from t5like.data.sources import files
from t5like.data.sources.base import Document, Source
from t5like.errors import UserError

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class JsonlSource(Source):
    """JSON lines files, plain or `.gz`; blank lines are passed over.

    Attributes:
      paths: a path or glob, or several.
      text_field: the field that holds the text.
      metadata_fields: fields kept as metadata; None keeps all others, () none. A field that a
        record lacks is missing there (NaN or "").
      on_error: "raise", or "skip" to pass over broken lines, count them and warn.
    """

    paths: str | Sequence[str]
    text_field: str = "text"
    metadata_fields: Sequence[str] | None = None
    on_error: str = "raise"

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise UserError(f"JsonlSource.on_error is {self.on_error!r}: choose raise or skip")

    @functools.cached_property
    def _files(self) -> list[files.File]:
        return files.expand(self.paths)

    def num_shards(self) -> int:
        return files.shard_count(self._files, by_line=True)

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        for piece in files.pieces(self._files, shard, num_shards, by_line=True):
            yield from self._piece(piece, Counter() if skipped is None else skipped)

    def _piece(self, piece: files.Piece, skipped: Counter) -> Iterator[Document]:
        path = str(piece.file.path)
        first = True
        for offset, line in files.lines(piece):
            if not line.strip():
                continue
            try:
                document = self._document(line, check_metadata=first)
            except _Broken as e:
                if self.on_error == "raise":
                    number = files.line_number(piece.file, offset)
                    raise UserError(f"{path}, line {number}: {e}") from e
                if not skipped[path]:
                    _logger.warning("%s: skipping broken lines, the first: %s", path, e)
                skipped[path] += 1
                continue
            first = False
            yield document

    def _document(self, line: bytes, check_metadata: bool) -> Document:
        try:
            record = json.loads(line)
        except ValueError as e:
            raise _Broken(
                f"not JSON ({e}): mend the line, or set JsonlSource.on_error = 'skip'"
            ) from e
        if not isinstance(record, dict):
            raise _Broken('not a JSON object: each line must be one, such as {"text": ...}')
        if self.text_field not in record:
            raise _Broken(
                f"no field {self.text_field!r}: {_nearest(self.text_field, record)} (set "
                "JsonlSource.text_field)"
            )
        text = record[self.text_field]
        if not isinstance(text, str):
            raise _Broken(f"field {self.text_field!r} is not a string but {type(text).__name__}")
        if not text.isascii():
            _check_unicode(text)
        if check_metadata:
            self._check_metadata(record)
        return Document(text, self._metadata(record))

    def _check_metadata(self, record: dict[str, Any]) -> None:
        """A field may be missing here and there, but not beside one that is spelt almost so."""
        for name in self.metadata_fields or ():
            others = [other for other in record if other not in self.metadata_fields]
            if name not in record and difflib.get_close_matches(name, others, 1):
                raise UserError(
                    f"{self.paths}: no metadata field {name!r}: {_nearest(name, others)} (set "
                    "JsonlSource.metadata_fields)"
                )

    def _metadata(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.metadata_fields is None:
            return {name: value for name, value in record.items() if name != self.text_field}
        return {name: record.get(name) for name in self.metadata_fields}

    @functools.cached_property
    def _fingerprint(self) -> str:
        fields = None if self.metadata_fields is None else tuple(self.metadata_fields)
        content = files.content_hash(self._files)
        return files.settings_hash("JsonlSource", self.text_field, fields, self.on_error, content)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


class _Broken(Exception):
    """What is wrong with one line."""


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise _Broken(f"the text is not valid Unicode ({e.reason})") from e
