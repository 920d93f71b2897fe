"""A corpus on disk: documents of tokens with metadata columns, random access, flat memory.

A store is a directory:
  tokens.bin          the tokens of all documents, uint16 or uint32, without EOS between them
  offsets.npy         int64 [documents + 1], where each document starts
  column_0000.npy     a metadata column; strings as column_0000.npy (offsets) and .utf8 (bytes)
  store.json          what it holds and is built from; written last: without it nothing counts
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5like.data.columns import RandomFile, check_columns, check_npy, check_size, read_columns
from t5like.errors import UserError

FORMAT = 1
INDEX = "store.json"


class Corpus:
    """A store, or a view of some of its documents in some order.

    Opening reads only the index; a pickled corpus is its path (and a view's document numbers).

    Attributes:
      directory: where the store lies.
      offsets: int64 [num_documents + 1], where each document starts in the token stream.
      metadata: column name -> array [num_documents], or `Strings` for a column of text.
    """

    def __init__(self, directory: str | os.PathLike, documents: np.ndarray | None = None):
        """Use `Corpus.open` and `select`."""
        self.directory = pathlib.Path(directory)
        self._documents = documents

    @classmethod
    def open(cls, directory: str | os.PathLike, vocabulary: Any = None) -> Corpus:
        """Opens a complete store.

        Args:
          vocabulary: if given, the vocabulary that the store must have been built with.

        Raises:
          UserError: no complete store is there, a file of it was cut short, or it was built with
            another vocabulary.
        """
        corpus = cls(directory)
        corpus._check_files()
        if vocabulary is not None and vocabulary.fingerprint() != corpus.vocabulary_fingerprint:
            raise UserError(
                f"the store {directory} was built with {corpus.index['vocabulary']} (fingerprint "
                f"{corpus.vocabulary_fingerprint}), not with {vocabulary} (fingerprint "
                f"{vocabulary.fingerprint()}): use that vocabulary, or another directory"
            )
        return corpus

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        """The content of store.json."""
        path = self.directory / INDEX
        try:
            index = json.loads(path.read_text())
        except FileNotFoundError as e:
            raise UserError(
                f"{self.directory} holds no complete store ({INDEX} is missing): build it"
            ) from e
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}): delete it and build again") from e
        if index["format"] != FORMAT:
            raise UserError(f"{path} has format {index['format']}, not {FORMAT}: build it again")
        return index

    def _check_files(self) -> None:
        documents, size = self.index["num_documents"], np.dtype(self.index["dtype"]).itemsize
        check_size(self.directory / "tokens.bin", self.index["num_tokens"] * size)
        check_npy(self.directory / "offsets.npy", documents + 1)
        check_columns(self.directory, self.index["columns"], documents)

    def __getstate__(self):
        return {"directory": self.directory, "_documents": self._documents}

    @property
    def fingerprint(self) -> str:
        """A hash of source and vocabulary, and of the documents a view selects."""
        if self._documents is None:
            return self.index["fingerprint"]
        digest = hashlib.blake2b(self.index["fingerprint"].encode(), digest_size=16)
        digest.update(self._documents.tobytes())
        return digest.hexdigest()

    @property
    def vocabulary_fingerprint(self) -> str:
        """The fingerprint of the vocabulary that made the tokens."""
        return self.index["vocabulary_fingerprint"]

    @property
    def num_documents(self) -> int:
        return self.index["num_documents"] if self._documents is None else len(self._documents)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @functools.cached_property
    def _store_offsets(self) -> np.ndarray:
        return np.load(self.directory / "offsets.npy", mmap_mode="r").view(np.ndarray)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        if self._documents is None:
            return self._store_offsets
        lengths = self._store_offsets[self._documents + 1] - self._store_offsets[self._documents]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    @functools.cached_property
    def _file(self) -> RandomFile:
        return RandomFile(self.directory / "tokens.bin")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream of all documents, uint16 or uint32 [stop - start].

        Raises:
          IndexError: unless 0 <= start <= stop <= num_tokens.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a corpus of {self.num_tokens}")
        if self._documents is None:
            return self._read(start, stop)
        if start == stop:
            return self._read(0, 0)
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        pieces = []
        for i in range(first, last):
            shift = int(self._store_offsets[self._documents[i]]) - int(self.offsets[i])
            low, high = max(start, int(self.offsets[i])), min(stop, int(self.offsets[i + 1]))
            pieces.append(self._read(low + shift, high + shift))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, start: int, stop: int) -> np.ndarray:
        size = self._dtype.itemsize
        return np.frombuffer(self._file.read(start * size, stop * size), self._dtype)

    @functools.cached_property
    def _dtype(self) -> np.dtype:
        return np.dtype(self.index["dtype"])

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, uint16 or uint32."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of a corpus of {self.num_documents}")
        return self.tokens(int(self.offsets[i]), int(self.offsets[i + 1]))

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        return read_columns(self.directory, self.index["columns"], self._documents)

    def select(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """A view of documents `indices` of this corpus, in that order; repeats are allowed.

        Raises:
          UserError: for an empty selection.
          IndexError: for a document that this corpus does not have.
        """
        chosen = np.asarray(indices, np.int64)
        if not len(chosen):
            raise UserError(f"no document of {self.directory} is selected: loosen the selection")
        if chosen.min() < 0 or chosen.max() >= self.num_documents:
            raise IndexError(f"documents {chosen.min()} to {chosen.max()} of {self.num_documents}")
        return Corpus(
            self.directory, chosen if self._documents is None else self._documents[chosen]
        )

    def __repr__(self) -> str:
        return f"Corpus({str(self.directory)!r}, {self.num_documents} documents)"
