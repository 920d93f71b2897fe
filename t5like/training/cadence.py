"""When the loop logs, evaluates and saves, and how it times its updates."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Every:
    """When what is done; the last update logs, evaluates and saves in any case.

    Attributes:
      total_steps: updates of the run.
      log, evaluate, save: updates between; None for never on the way.
      save_minutes: minutes after which the next update saves too; None for no clock.
      points: updates after which it saves besides.
    """

    total_steps: int
    log: int | None
    evaluate: int | None
    save: int | None
    save_minutes: float | None
    points: frozenset[int] = frozenset()

    def due(self, every: int | None, step: int) -> bool:
        """Whether what happens every `every` updates happens after update `step`."""
        return step == self.total_steps or bool(every and step % every == 0)

    def save_due(self, step: int, seconds: float) -> bool:
        """Whether to save after update `step`, `seconds` after the last save."""
        late = self.save_minutes is not None and seconds >= 60 * self.save_minutes
        return late or step in self.points or self.due(self.save, step)


class Stopwatch:
    """Seconds spent on updates since the last restart, pauses left out."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Counts from 0 again."""
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time in the block out."""
        before = self.seconds()
        yield
        self._start = time.monotonic() - before
