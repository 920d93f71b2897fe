"""What makes a checkpoint complete: a manifest of its files, written last, checked before use.

`checkpoint.json` lists every file with its size and CRC-32. Array formats do not notice every
missing or damaged byte (a missing chunk may read as zeros), so the manifest is what decides.
"""

from __future__ import annotations

import concurrent.futures
import json
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from t5like.data.atomic import is_remote
from t5like.training import distributed

NAME = "checkpoint.json"
CONFIG_NAME = "config.gin"
# Written by orbax after the manifest.
COMMITTED = "commit_success.txt"
_NOT_LISTED = (NAME, "_CHECKPOINT_METADATA", COMMITTED)


class Damaged(Exception):
    """A checkpoint that must not be used; the message says why."""


def write(directory: epath.Path, info: dict[str, Any], config_text: str) -> None:
    """Adds config.gin, then checkpoint.json = info plus the list of files."""
    (directory / CONFIG_NAME).write_text(config_text)
    files = _digests(directory, _listing(directory))
    text = json.dumps({**info, "files": files}, indent=1, sort_keys=True)
    (directory / NAME).write_text(text)


def add_metrics(directory: epath.Path, metrics: dict[str, float]) -> None:
    """Adds to the metrics of a checkpoint, whole or not at all."""
    info = read(directory)
    info["metrics"] = {**(info.get("metrics") or {}), **metrics}
    text = json.dumps(info, indent=1, sort_keys=True)
    if is_remote(directory):
        (directory / NAME).write_text(text)
        return
    fresh = directory.parent / f"{directory.name}.{NAME}.tmp"
    fresh.write_text(text)
    fresh.replace(directory / NAME)


def read(directory: epath.Path) -> dict[str, Any]:
    """The info of a checkpoint, without checking its files.

    Raises:
      Damaged: there is no readable manifest.
    """
    try:
        info = json.loads((directory / NAME).read_text())
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, OSError) as error:
        raise Damaged(f"{NAME} cannot be read ({error})") from error
    if not isinstance(info, dict) or not isinstance(info.get("files"), dict):
        raise Damaged(f"{NAME} lists no files")
    return info


def verify(directory: epath.Path) -> dict[str, Any]:
    """The info of a checkpoint whose every file is as it was written.

    Of several processes, which all call this, each reads its share of the files, and all come to
    the same answer.

    Raises:
      Damaged: the manifest or a listed file is missing, or a file's size or content differs.
    """
    info, problem = {}, ""
    try:
        info = read(directory)
        own = sorted(info["files"])[distributed.process_index() :: distributed.process_count()]
        _check(directory, {name: info["files"][name] for name in own})
    except Damaged as damage:
        problem = str(damage)
    problems = [text for text in distributed.gather("verified", problem) if text]
    if problems:
        raise Damaged(problems[0])
    return info


def _check(directory: epath.Path, files: dict[str, list[int]]) -> None:
    for name in files:
        if not (directory / name).exists():
            raise Damaged(f"{name} is missing")
    for name, (found_size, found_crc) in _digests(directory, files).items():
        size, crc = files[name]
        if found_size != size:
            raise Damaged(f"{name} has {found_size} bytes, not {size}")
        if found_crc != crc:
            raise Damaged(f"the content of {name} has changed")


def _listing(directory: epath.Path, prefix: str = "") -> list[str]:
    names = []
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            names += _listing(path, f"{prefix}{path.name}/")
        elif prefix or path.name not in _NOT_LISTED:
            names.append(prefix + path.name)
    return names


def _digests(directory: epath.Path, names: Iterable[str]) -> dict[str, list[int]]:
    """{name: _digest}; several files at a time, as storage is slower than the sum."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        paths = [directory / name for name in names]
        return dict(zip(names, pool.map(_digest, paths), strict=True))


def _digest(path: epath.Path) -> list[int]:
    """[size in bytes, CRC-32], read in pieces so that memory stays flat."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return [size, crc]
