"""When the loop logs, evaluates and saves, and how it times its updates."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from t5like.training import distributed


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

    def save_due(self, step: int) -> bool:
        """Whether to save after update `step`, whatever the clock says (see SaveClock)."""
        return step in self.points or self.due(self.save, step)


class SaveClock:
    """When the last save is too long ago.

    Of several processes the first one's clock decides, and all save after one update, a few
    updates later.

    Args:
      minutes: after which to save; None: never.
    """

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self.restart()

    def restart(self) -> None:
        """A save was made."""
        self._saved_at, self._asked = time.monotonic(), False

    def due(self) -> bool:
        """Whether to save now; asked after every update, by all processes."""
        if self._minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self._minutes
        agreement = distributed.agreement("save")
        if agreement is None:
            return late
        if late and not self._asked and distributed.process_index() == 0:
            self._asked = True
            distributed.want("save")
        return agreement.check()


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
