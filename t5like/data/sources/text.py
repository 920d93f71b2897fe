"""Plain text files: a document is a file, a line or a paragraph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from t5like.data.sources import files
from t5like.data.sources.base import Document, Source
from t5like.errors import UserError

UNITS = ("file", "line", "paragraph")


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
    """UTF-8 text files, plain or `.gz`.

    Attributes:
      paths: a path or glob, or several.
      unit: what one document is: "file" (its name becomes metadata `path`), "line" (without its
        line end) or "paragraph" (lines up to a blank one).
    """

    paths: str | Sequence[str]
    unit: str = "file"

    def __post_init__(self):
        if self.unit not in UNITS:
            raise UserError(f"TextSource.unit is {self.unit!r}: choose one of {', '.join(UNITS)}")

    @functools.cached_property
    def _files(self) -> list[files.File]:
        return files.expand(self.paths)

    def num_shards(self) -> int:
        return files.shard_count(self._files, by_line=self.unit == "line")

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        read = {"file": _whole, "line": _lines, "paragraph": _paragraphs}[self.unit]
        for piece in files.pieces(self._files, shard, num_shards, by_line=self.unit == "line"):
            yield from read(piece)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return files.settings_hash("TextSource", self.unit, files.content_hash(self._files))


def _whole(piece: files.Piece) -> Iterator[Document]:
    with files.open_bytes(piece.file) as stream:
        data = stream.read()
    yield Document(files.decode(data, piece.file), {"path": piece.file.path.name})


def _lines(piece: files.Piece) -> Iterator[Document]:
    for lines in _text_lines(piece):
        yield from map(Document, lines)


def _paragraphs(piece: files.Piece) -> Iterator[Document]:
    held: list[str] = []
    for line in itertools.chain.from_iterable(_text_lines(piece)):
        if line and not line.isspace():
            held.append(line)
        elif held:
            yield Document("\n".join(held))
            held = []
    if held:
        yield Document("\n".join(held))


def _text_lines(piece: files.Piece) -> Iterator[list[str]]:
    """Lines without their ends, decoded and split a block at a time, which makes this fast."""
    for offset, block in files.blocks(piece):
        text = files.decode(block, piece.file, offset).removesuffix("\n")
        lines = text.split("\n")
        yield [line.removesuffix("\r") for line in lines] if "\r" in text else lines
