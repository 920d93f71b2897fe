"""Where log lines go: metrics.jsonl, TensorBoard and the screen."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import tensorboardX
from etils import epath
from rich import console, progress

from t5like.errors import UserError


class Writer:
    """What gets log lines."""

    def write(self, line: dict[str, Any]) -> None:
        """Takes a line: {"step", "split", name: value}."""
        raise NotImplementedError

    def advance(self, step: int) -> None:
        """Hears that `step` updates are done; most writers do not care."""

    def close(self) -> None:
        """Ends the writing."""
        raise NotImplementedError


class JsonLines(Writer):
    """One JSON object a line, each on disk as soon as it is written.

    Opening drops the lines of steps past `step` (and a last line cut short by a kill), so a
    resumed run never logs a step twice. Numbers that are not finite become null.

    Raises:
      UserError: from any method, when the file cannot be written (a full disk).
    """

    def __init__(self, path: epath.PathLike, step: int):
        self._path = epath.Path(path)
        with self._naming():
            self._truncate(step)
            self._file = self._path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with self._naming():
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; free some space") from error

    def _truncate(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for text in self._path.read_text().splitlines():
            line = _parse(text)
            if line is not None and line.get("step", 0) <= step:
                kept.append(text + "\n")
        fresh = self._path.parent / (self._path.name + ".tmp")
        fresh.write_text("".join(kept))
        fresh.replace(self._path)


class TensorBoard(Writer):
    """Scalars `split/name`; earlier events past `step` are hidden."""

    def __init__(self, directory: epath.PathLike, step: int):
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{line['split']}/{name}", value, line["step"])

    def close(self) -> None:
        self._writer.close()


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
    folder: epath.Path, step: int, total_steps: int, screen: bool, tensorboard: bool
) -> list[Writer]:
    """The writers of a run that goes on from `step`; none except in the first process."""
    if jax.process_index() != 0:
        return []
    opened: list[Writer] = [JsonLines(folder / "metrics.jsonl", step)]
    if tensorboard:
        opened.append(TensorBoard(folder / "tensorboard", step))
    if screen:
        opened.append(Screen(step, total_steps))
    return opened


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
