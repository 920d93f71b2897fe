"""Writing a store: one part a shard, each complete or absent, then one merge that streams.

A part is `<shard>.tokens`, `.lengths`, `.metadata` (a JSON object a document) and, written last,
`.json`. A killed build therefore keeps every finished part, and the bytes of the merged store do
not depend on who built which part when.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5like.data.atomic import replacing
from t5like.data.columns import common_kind, kind_of, npy_header, write_columns
from t5like.data.sources.base import Document, Source
from t5like.data.store import FORMAT, INDEX

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_COPY_BYTES = 4 << 20


def token_dtype(vocabulary: Any) -> np.dtype:
    """Two bytes a token where the vocabulary allows, else four."""
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)


def write_part(
    source: Source,
    vocabulary: Any,
    shard: int,
    num_shards: int,
    directory: pathlib.Path,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Tokenises one shard into `directory`, unless that is done, and returns its summary.

    Args:
      advance: is told the number of tokens after every batch.
    """
    stem = directory / f"{shard:06d}"
    if (summary := _finished(stem)) is not None:
        return summary
    dtype = token_dtype(vocabulary)
    skipped, rows = Counter(), _Kinds()
    counts = {"num_documents": 0, "num_tokens": 0, "empty": 0}
    with (
        replacing(stem.with_suffix(".tokens")) as tokens,
        replacing(stem.with_suffix(".lengths")) as lengths,
        replacing(stem.with_suffix(".metadata")) as metadata,
    ):
        for batch in _batches(source.documents(shard, num_shards, skipped=skipped)):
            encoded = vocabulary.encode_batch([document.text for document in batch])
            sizes = np.array([len(ids) for ids in encoded], np.int64)
            tokens.write(np.concatenate(encoded).astype(dtype).tobytes())
            lengths.write(sizes[sizes > 0].tobytes())
            kept = [document.metadata for document, size in zip(batch, sizes, strict=True) if size]
            rows.add(kept)
            metadata.write(b"".join(map(_row, kept)))
            counts["num_documents"] += len(kept)
            counts["num_tokens"] += int(sizes.sum())
            counts["empty"] += len(batch) - len(kept)
            advance(int(sizes.sum()))
    summary = {**counts, "skipped": dict(skipped), "kinds": rows.kinds()}
    with replacing(stem.with_suffix(".json")) as done:
        done.write(json.dumps(summary).encode())
    return summary


def _finished(stem: pathlib.Path) -> dict[str, Any] | None:
    done = stem.with_suffix(".json")
    return json.loads(done.read_text()) if done.exists() else None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(metadata)).encode() + b"\n" if metadata else b"{}\n"


class _Kinds:
    """Which kinds of values each metadata column of a part has."""

    def __init__(self):
        self._rows = 0
        self._seen: dict[str, Counter] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows += len(rows)
        for row in filter(None, rows):
            for name, value in row.items():
                self._seen.setdefault(name, Counter())[kind_of(value)] += 1

    def kinds(self) -> dict[str, list[str]]:
        """Name -> kinds, "null" among them where a row lacks the column."""
        return {
            name: sorted({*seen, *(["null"] if seen.total() < self._rows else [])})
            for name, seen in self._seen.items()
        }


# --- the merge -------------------------------------------------------------------------------


def merge(parts: list[tuple[pathlib.Path, dict]], directory: pathlib.Path, index: dict) -> None:
    """Joins parts (stem, summary) into a store; `index` says what it is built from."""
    total = {key: sum(s[key] for _, s in parts) for key in ("num_documents", "num_tokens", "empty")}
    skipped = Counter()
    for _, summary in parts:
        skipped.update(summary["skipped"])
    stems = [stem for stem, _ in parts]
    _join_tokens(stems, directory / "tokens.bin")
    _join_offsets(stems, directory / "offsets.npy", total["num_documents"])
    kinds = _column_kinds([summary for _, summary in parts])
    columns = write_columns(_rows(stems), kinds, directory, total["num_documents"])
    index = {"format": FORMAT, **index, **total, "skipped": dict(skipped), "columns": columns}
    with replacing(directory / INDEX) as stream:
        stream.write(json.dumps(index, indent=1).encode())


def _join_tokens(stems: list[pathlib.Path], path: pathlib.Path) -> None:
    with replacing(path) as out:
        for stem in stems:
            with open(stem.with_suffix(".tokens"), "rb") as part:
                shutil.copyfileobj(part, out, _COPY_BYTES)


def _join_offsets(stems: list[pathlib.Path], path: pathlib.Path, documents: int) -> None:
    with replacing(path) as out:
        npy_header(out, np.int64, documents + 1)
        out.write(np.zeros(1, np.int64).tobytes())
        end = 0
        for stem in stems:
            with open(stem.with_suffix(".lengths"), "rb") as part:
                while block := part.read(_COPY_BYTES):
                    ends = end + np.cumsum(np.frombuffer(block, np.int64))
                    out.write(ends.tobytes())
                    end = int(ends[-1])


def _column_kinds(summaries: list[dict]) -> dict[str, str]:
    names = sorted({name for summary in summaries for name in summary["kinds"]})
    return {
        name: common_kind(
            kind
            for summary in summaries
            if summary["num_documents"]
            for kind in summary["kinds"].get(name, ["null"])
        )
        for name in names
    }


def _rows(stems: list[pathlib.Path]) -> Iterator[dict[str, Any]]:
    for stem in stems:
        with open(stem.with_suffix(".metadata"), "rb") as part:
            for line in part:
                yield json.loads(line)
