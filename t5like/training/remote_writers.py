"""Log lines in an object store (gs://), where a file cannot grow: it is written anew."""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Collection
from typing import Any

from absl import logging
from etils import epath

from t5like.errors import UserError
from t5like.training import writers

# Object stores take about one write of an object a second, and the file grows.
_SECONDS = 60
# Seconds between the tries of a write that must not fail.
_PAUSES = (1, 3, 9)


class RemoteLines(writers.Writer):
    """metrics.jsonl as writers.JsonLines keeps it; stored once a minute, at `flush` and at `close`.

    The loop flushes before it saves: a run that goes on from a checkpoint has all lines up to it.
    `close` only warns, for how the run ended must not be lost in an error of its own.

    Raises:
      UserError: on opening, and after some tries on `flush`, when the file cannot be written.
    """

    def __init__(self, path: epath.PathLike, step: int, again: Collection[str] = ()):
        self._path = epath.Path(path)
        self._lines = writers.kept_lines(self._path, step, again)
        self._changed = True
        self._store()

    def write(self, line: dict[str, Any]) -> None:
        self._lines.append(writers.encoded(line))
        self._changed = True
        if time.monotonic() - self._written > _SECONDS:
            try:
                self._store()
            except UserError as error:  # There is time: the next flush has these lines too.
                self._written = time.monotonic()
                logging.warning("%s", error)

    def flush(self) -> None:
        for pause in _PAUSES:
            try:
                self._store()
                return
            except UserError as error:
                logging.warning("%s; trying again in %d s", error, pause)
                time.sleep(pause)
        self._store()

    def _store(self) -> None:
        if not self._changed:
            return
        try:
            self._path.write_text("".join(self._lines))
        except Exception as error:  # Each store's client has errors of its own.
            raise UserError(f"cannot write {self._path}: {error}") from error
        self._changed, self._written = False, time.monotonic()

    def close(self) -> None:
        try:
            self.flush()
        except UserError as error:
            logging.warning("%s: lines since the last checkpoint may be missing", error)


class RemoteTensorBoard(writers.TensorBoard):
    """writers.TensorBoard in a local folder, whose file is copied at every flush."""

    def __init__(self, directory: epath.PathLike, step: int):
        self._target = epath.Path(directory)
        self._scratch = tempfile.TemporaryDirectory(prefix="t5like-events-")
        super().__init__(self._scratch.name, step)

    def flush(self) -> None:
        self._flush()

    def close(self) -> None:
        super().close()
        self._copy()
        self._scratch.cleanup()

    def _flush(self) -> None:
        super()._flush()
        self._copy()

    def _copy(self) -> None:
        try:
            for path in pathlib.Path(self._scratch.name).iterdir():
                (self._target / path.name).write_bytes(path.read_bytes())
        except Exception as error:  # The numbers are in metrics.jsonl as well.
            logging.warning("cannot write %s now: %s", self._target, error)
