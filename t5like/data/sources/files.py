"""Files as a source reads them: globs, gzip, byte ranges, and errors that name the file."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from etils import epath

from t5like.errors import UserError

SHARD_BYTES = 32 << 20
HASHED_WHOLE = 16 << 20
_GZIP_RATIO = 3
_BLOCK = 1 << 20


class File(NamedTuple):
    """A file and its size in bytes."""

    path: epath.Path
    size: int

    @property
    def compressed(self) -> bool:
        return self.path.suffix == ".gz"


class Piece(NamedTuple):
    """Bytes [start, stop) of a file; stop None is the end, and the only choice under gzip."""

    file: File
    start: int = 0
    stop: int | None = None


def expand(paths: str | Sequence[str]) -> list[File]:
    """Files that paths and globs name: in the order given, and sorted within a glob.

    Raises:
      UserError: for a missing file (the nearest name is given), a directory, or an empty glob.
    """
    names = [paths] if isinstance(paths, (str, epath.Path)) else list(paths)
    if not names:
        raise UserError("no paths given: name at least one file or glob")
    found = [path for name in names for path in _expand_one(str(name))]
    with reading(found[0]):
        return [File(path, path.stat().length) for path in found]


def _expand_one(name: str) -> list[epath.Path]:
    parts = epath.Path(name).parts
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if wild is None:
        return [_existing(epath.Path(name))]
    matches = epath.Path(*parts[:wild]).glob("/".join(parts[wild:]))
    found = sorted((path for path in matches if path.is_file()), key=str)
    if not found:
        raise UserError(f"no file matches {name}: correct the pattern")
    return found


def _existing(path: epath.Path) -> epath.Path:
    if path.is_dir():
        raise UserError(f"{path} is a directory: name its files, such as {path}/*.txt")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        mend = f"did you mean {path.parent / near[0]}?" if near else "correct the path"
        raise UserError(f"{path} does not exist: {mend}")
    return path


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Turns what can go wrong while reading `path` into a UserError that names it."""
    try:
        yield
    except EOFError as e:
        raise UserError(f"{path} is truncated ({e}): copy or download it again") from e
    except (gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a readable gzip file ({e}): copy it again") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from e


@contextlib.contextmanager
def open_bytes(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, uncompressed."""
    with reading(file.path), file.path.open("rb") as raw:
        if not file.compressed:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as plain:
            yield io.BufferedReader(plain, 1 << 20)


def pieces(files: Sequence[File], shard: int, num_shards: int, *, by_line: bool) -> Iterator[Piece]:
    """What of the files belongs to a shard: an equal share of all their bytes, in order.

    Args:
      by_line: whether an uncompressed file may be cut (its reader then keeps lines whole);
        any other file belongs to the shard that holds its first byte.
    """
    total = sum(file.size for file in files)
    low, high = total * shard // num_shards, total * (shard + 1) // num_shards
    begin = 0
    for file in files:
        end = begin + file.size
        if by_line and not file.compressed:
            start, stop = max(low, begin), min(high, end)
            if start < stop:
                yield Piece(file, start - begin, stop - begin)
        elif low <= begin < high:
            yield Piece(file)
        begin = end


def share(sizes: Sequence[int], shard: int, num_shards: int) -> slice:
    """The run of whole items whose first byte lies in a shard's equal share of all bytes."""
    total, begin, inside = sum(sizes), 0, []
    low, high = total * shard // num_shards, total * (shard + 1) // num_shards
    for i, size in enumerate(sizes):
        if low <= begin < high:
            inside.append(i)
        begin += size
    return slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)


def shard_count(files: Sequence[File], *, by_line: bool) -> int:
    """Shards of about SHARD_BYTES of text; no more than can be cut."""
    text = sum(file.size * (_GZIP_RATIO if file.compressed else 1) for file in files)
    wanted = max(1, -(-text // SHARD_BYTES))
    can_cut = by_line and not all(file.compressed for file in files)
    return wanted if can_cut else min(wanted, len(files))


def blocks(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(Byte offset, about a megabyte of whole lines): the lines that begin inside the piece."""
    with open_bytes(piece.file) as stream:
        offset = piece.start
        if piece.start:
            stream.seek(piece.start - 1)
            offset += len(stream.readline()) - 1
        while piece.stop is None or offset < piece.stop:
            left = _BLOCK if piece.stop is None else min(_BLOCK, piece.stop - offset)
            if not (block := stream.read(left)):
                return
            if not block.endswith(b"\n"):
                block += stream.readline()
            yield offset, block
            offset += len(block)


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(Byte offset, line without its newline) of the lines that begin inside the piece."""
    for offset, block in blocks(piece):
        for line in block.removesuffix(b"\n").split(b"\n"):
            yield offset, line
            offset += len(line) + 1


def line_number(file: File, offset: int) -> int:
    """The number, from 1, of the line that starts at an (uncompressed) byte offset."""
    with open_bytes(file) as stream:
        left, count = offset, 1
        while left and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
        return count


def decode(data: bytes, file: File, offset: int = 0) -> str:
    """UTF-8 text of bytes found at `offset`, or a UserError that names the file and line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = line_number(file, offset + e.start)
        raise UserError(
            f"{file.path}, line {line}: not UTF-8 ({e.reason}): convert the file to UTF-8"
        ) from e


def content_hash(files: Sequence[File]) -> str:
    """A hash of names, sizes and content (of large files, a part), whatever folder they lie in.

    Files over HASHED_WHOLE bytes count by modification time and three samples instead of whole:
    a copy with another modification time is another content.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path.name}\0{file.size}\0".encode())
        with reading(file.path), file.path.open("rb") as stream:
            if file.size <= HASHED_WHOLE:
                digest.update(stream.read())
                continue
            digest.update(repr(file.path.stat().mtime).encode())
            for start in (0, file.size // 2, file.size - (1 << 20)):
                stream.seek(start)
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def settings_hash(kind: str, *settings: object) -> str:
    """A fingerprint from a class name and the repr of plain settings."""
    return hashlib.blake2b(repr((kind, *settings)).encode(), digest_size=16).hexdigest()
