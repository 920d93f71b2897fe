"""Where log lines go: metrics.jsonl, TensorBoard and the screen."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from rich import console, progress
from tensorboardX import event_file_writer, record_writer, summary
from tensorboardX.proto import event_pb2

from t5like.data.atomic import is_remote, writing
from t5like.errors import UserError

_FLUSH_SECONDS = 60


class Writer:
    """What gets log lines."""

    def write(self, line: dict[str, Any]) -> None:
        """Takes a line: {"step", "split", name: value}."""
        raise NotImplementedError

    def advance(self, step: int) -> None:
        """Hears that `step` updates are done; most writers do not care."""

    def flush(self) -> None:
        """Keeps what was written, come what may; called before a checkpoint is saved."""

    def close(self) -> None:
        """Ends the writing."""
        raise NotImplementedError


class JsonLines(Writer):
    """One JSON object a line, each on disk as soon as it is written.

    Opening drops the lines of steps past `step`, those of `step` itself of the splits in `again`
    (and a last line cut short by a kill), so a resumed run never logs a step twice. Numbers that
    are not finite become null.

    Raises:
      UserError: on opening and writing, when the file cannot be written (a full disk).
    """

    def __init__(self, path: epath.PathLike, step: int, again: Collection[str] = ()):
        self._path = epath.Path(path)
        with self._naming():
            self._truncate(step, again)
            self._file = self._path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        with self._naming():
            self._file.write(encoded(line))
            self._file.flush()

    def close(self) -> None:
        # Every line is flushed; what is left here is a line whose write has raised already.
        try:
            self._file.close()
        except OSError as error:
            logging.warning("cannot finish %s: %s", self._path, error)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; free some space") from error

    def _truncate(self, step: int, again: Collection[str]) -> None:
        if not self._path.exists():
            return
        kept = kept_lines(self._path, step, again)
        fresh = self._path.parent / (self._path.name + ".tmp")
        fresh.write_text("".join(kept))
        fresh.replace(self._path)


class TensorBoard(Writer):
    """Scalars `split/name`; earlier events past `step` are hidden.

    Events are written in the caller's thread: tensorboardX's SummaryWriter has a thread of its
    own, and blocks for ever once that has died of a full disk. After a failed write this warns
    and writes no more: the numbers are in metrics.jsonl as well.

    Raises:
      UserError: on opening, when the directory cannot be written.
    """

    def __init__(self, directory: epath.PathLike, step: int):
        self._directory, self._broken = str(directory), False
        with writing(self._directory):
            record_writer.directory_check(self._directory)
            self._events = event_file_writer.EventsWriter(f"{self._directory}/events")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step + 1, file_version="brain.Event:2")
            self._add(step + 1, session_log=start)
            self._flush()

    def write(self, line: dict[str, Any]) -> None:
        with self._warning_once():
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    scalar = summary.scalar(f"{line['split']}/{name}", value)
                    self._add(line["step"], summary=scalar)
            if not self._broken and time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def close(self) -> None:
        with self._warning_once():
            self._events.close()

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._broken:
                logging.warning("cannot write %s, so it stays as it is: %s", self._directory, error)
            self._broken = True

    def _add(self, step: int, **what: Any) -> None:
        if not self._broken:
            event = event_pb2.Event(step=step, wall_time=time.time(), **what)
            self._events.write_event(event)

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()


class Screen(Writer):
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, step: int, total_steps: int, out: console.Console | None = None):
        self._console = out or console.Console()
        self._total, self._start, self._started = total_steps, step, None
        self._bar = None
        if self._console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[note]}"),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=step, note="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._started is None:  # Compilation, in the first update, says nothing of the rest.
            self._start, self._started = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, line: dict[str, Any]) -> None:
        text = f"loss {line['loss']:.4f}"
        if line["split"] != "train":
            self._console.print(f"step {line['step']}: {line['split']} {text}", highlight=False)
            return
        text += f"  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        else:
            left = self._seconds_left(line["step"])
            self._console.print(
                f"step {line['step']}/{self._total}  {text}  {left} left", highlight=False
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int) -> str:
        done = max(step - self._start, 1)
        started = time.monotonic() if self._started is None else self._started
        seconds = (time.monotonic() - started) / done * (self._total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def open_all(
    folder: epath.Path,
    step: int,
    total_steps: int,
    screen: bool,
    tensorboard: bool,
    again: Collection[str] = (),
) -> list[Writer]:
    """The writers of a run that goes on from `step`; none except in the first process.

    Args:
      again: splits that will be evaluated at `step`; their lines of it are dropped.
    """
    if jax.process_index() != 0:
        return []
    lines, events = JsonLines, TensorBoard
    if is_remote(folder):
        from t5like.training import remote_writers

        lines, events = remote_writers.RemoteLines, remote_writers.RemoteTensorBoard
    opened: list[Writer] = [lines(folder / "metrics.jsonl", step, again)]
    if tensorboard:
        opened.append(events(folder / "tensorboard", step))
    if screen:
        opened.append(Screen(step, total_steps))
    return opened


def kept_lines(path: epath.Path, step: int, again: Collection[str] = ()) -> list[str]:
    """Lines of a log that a run which goes on from `step` keeps, see JsonLines; [] of none."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else ():
        line = _parse(text)
        if line is None or line.get("step", 0) > step:
            continue
        if line.get("step") != step or line.get("split") not in again:
            kept.append(text + "\n")
    return kept


def encoded(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl; numbers that are not finite become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    return json.dumps(finite) + "\n"


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
