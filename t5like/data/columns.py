"""Metadata columns of a store: typed, written as a stream, read at random.

Numbers are `.npy` arrays; text is UTF-8 bytes with an `.npy` of offsets. A number that a document
lacks is NaN (so the column is float64, or text where that would round an integer), a text that it
lacks is "".
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from t5like.data.atomic import replacing
from t5like.errors import UserError

_DTYPES = {"bool": np.bool_, "int": np.int64, "float": np.float64}


class RandomFile:
    """Reads bytes of a file at any offset; opened at first use, pickled as its path.

    pread, not a memory map: pages touched through a map count as resident memory, and after an
    epoch that is the whole corpus.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    @functools.cached_property
    def _file(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop).

        Raises:
          UserError: the file is shorter than that.
        """
        data = os.pread(self._file.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise UserError(f"{self.path} was cut short: delete its folder and build it again")
        return data

    def __getstate__(self):
        return {"path": self.path}


class Strings:
    """A column of text: `column[i]` is document i's.

    Attributes:
      ends: int64 [n + 1], where each string starts in the file.
      documents: the rows of a view, or None for all in order.
    """

    def __init__(self, file: RandomFile, ends: np.ndarray, documents: np.ndarray | None = None):
        self._file, self._ends, self._documents = file, ends, documents

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._documents is None else len(self._documents)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of a column of {len(self)}")
        row = int(i if self._documents is None else self._documents[i])
        return self._file.read(int(self._ends[row]), int(self._ends[row + 1])).decode()


def read_columns(
    directory: pathlib.Path, columns: Mapping[str, Mapping[str, str]], documents: np.ndarray | None
) -> dict[str, Any]:
    """Name -> array or Strings, of all documents or of those of a view."""
    found = {}
    for name, column in columns.items():
        path = directory / column["file"]
        values = np.load(path, mmap_mode="r").view(np.ndarray)
        if column["kind"] == "str":
            found[name] = Strings(RandomFile(path.with_suffix(".utf8")), values, documents)
        else:
            found[name] = values if documents is None else values[documents]
    return found


def check_columns(
    directory: pathlib.Path, columns: Mapping[str, Mapping[str, str]], length: int
) -> None:
    """Raises UserError unless every column is complete and has `length` rows."""
    for column in columns.values():
        path = directory / column["file"]
        text = column["kind"] == "str"
        check_npy(path, length + text)
        if text:
            ends = np.load(path, mmap_mode="r")
            check_size(path.with_suffix(".utf8"), int(ends[-1]))


def check_npy(path: pathlib.Path, length: int) -> None:
    """Raises UserError unless `path` is a whole `.npy` file of one dimension and `length` rows."""
    try:
        with open(path, "rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            header = stream.tell()
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): {_rebuild(path)}") from e
    if shape != (length,):
        raise UserError(f"{path} has shape {shape} instead of ({length},): {_rebuild(path)}")
    check_size(path, header + length * dtype.itemsize)


def check_size(path: pathlib.Path, expected: int) -> None:
    """Raises UserError unless `path` has so many bytes."""
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {_rebuild(path)}")


def _rebuild(path: pathlib.Path) -> str:
    return f"delete {path.parent} and build it again"


# --- writing ---------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """The kind of one value: "null", "bool", "int", "float", or "str" for all that is none.

    "long" is an int that fits 64 bits but not the 53 of a float64.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= 2**53:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "str"
    return "float" if isinstance(value, float) else "str"


def common_kind(kinds: Iterable[str]) -> str:
    """The narrowest of "bool", "int", "float" and "str" that holds values of all these kinds."""
    kinds = set(kinds)
    if "str" in kinds or kinds == {"null"}:
        return "str"
    if kinds == {"bool"}:
        return "bool"
    if kinds <= {"int", "long"}:
        return "int"
    return "str" if "long" in kinds else "float"


def npy_header(stream: BinaryIO, dtype: Any, length: int) -> None:
    """Starts an `.npy` file of one dimension whose values follow as a stream."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)


def write_columns(
    rows: Iterable[Mapping[str, Any]],
    kinds: Mapping[str, str],
    directory: pathlib.Path,
    length: int,
) -> dict[str, dict[str, str]]:
    """Writes one column per name of `kinds` in one pass; returns what `read_columns` needs."""
    columns = {
        name: {"kind": kind, "file": f"column_{number:04d}.npy"}
        for number, (name, kind) in enumerate(kinds.items())
    }
    with contextlib.ExitStack() as stack:
        writers = {
            name: _writer(stack, directory / column["file"], column["kind"], length)
            for name, column in columns.items()
        }
        for row in rows if writers else ():
            for name, write in writers.items():
                write(row.get(name))
    return columns


def _writer(stack: contextlib.ExitStack, path: pathlib.Path, kind: str, length: int):
    values = stack.enter_context(replacing(path))
    if kind != "str":
        dtype = np.dtype(_DTYPES[kind]).type
        npy_header(values, dtype, length)
        return lambda value: values.write(dtype(math.nan if value is None else value).tobytes())

    text = stack.enter_context(replacing(path.with_suffix(".utf8")))
    npy_header(values, np.int64, length + 1)
    values.write(np.int64(0).tobytes())

    def write(value: Any) -> None:
        text.write(_as_text(value).encode("utf-8", "replace"))
        values.write(np.int64(text.tell()).tobytes())

    return write


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
