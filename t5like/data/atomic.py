"""Writes that are complete or absent, and errors that name what could not be written."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from t5like.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns a failed write under `path` into a UserError that names it."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise UserError(
                f"no space left to write {path} ({e.strerror}): free some and run the same "
                "command again; what is finished is kept"
            ) from e
        raise UserError(f"{path} cannot be written ({e.strerror or e})") from e


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store (gs://): a file appears there whole or not at all,
    nothing is appended to, and a folder is but a prefix, which cannot be renamed at one stroke."""
    return "://" in os.fspath(path)


def local(path: str | os.PathLike) -> pathlib.Path:
    """The path, unless it is on remote storage: then a UserError says where to put it instead."""
    if is_remote(path):
        raise UserError(f"{path} must be on a local disk: set train.cache_dir to a folder on one")
    return pathlib.Path(path)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A stream that becomes `path` when all is written, and leaves no trace otherwise.

    Raises:
      UserError: naming `path`, where it cannot be written (a full disk).
    """
    # Processes of several machines, which may have one number, may share the folder.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
