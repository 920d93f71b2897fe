"""Traces of chosen updates for TensorBoard's profile view: by a setting, or on SIGUSR1.

    python launch/train.py ... --gin.train.profile='(100, 104)'
    kill -USR1 PID                     # the next updates of a run that is under way

A trace lies at WORKDIR/tensorboard/plugins/profile/UPDATES/HOST.xplane.pb, where
`tensorboard --logdir=WORKDIR/tensorboard` (with the package tensorboard-plugin-profile) shows it.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from t5like.errors import UserError

# Updates that a signal asks for: enough to see what varies, few enough to look through.
SIGNAL_UPDATES = 5


class Profiler:
    """Records updates of one call of `fit`.

    Updates are counted as in metrics.jsonl: update n is the one after which n are done. The caller
    sees to it that the devices have nothing left to do at `begin` and `end`, so that a trace
    holds its updates whole and no others. Every process records its own devices on the setting;
    on a signal, the process that gets it. A trace that cannot be made is warned about and never
    stops a run.

    Args:
      workdir: of the run.
      updates: (first, last) to record, both included, or None.
    """

    def __init__(self, workdir: epath.PathLike, updates: Sequence[int] | None = None):
        self._folder = epath.Path(workdir) / "tensorboard" / "plugins" / "profile"
        self._planned = (1, 0) if updates is None else checked(updates)
        self._signalled = False
        self._recording: tuple[int, int] | None = None
        self._done = 0

    def request(self, *_: Any) -> None:
        """Asks for the next updates; a signal handler."""
        self._signalled = True

    def begins(self, step: int) -> bool:
        """Whether a trace is to begin when `step` updates are done."""
        if self._recording is not None:
            return False
        return self._signalled or self._is_planned(step + 1)

    def ends(self, step: int) -> bool:
        """Whether the trace under way is to end when `step` updates are done."""
        return self._recording is not None and step >= self._recording[1]

    def begin(self, step: int) -> None:
        """Begins a trace with update `step` + 1."""
        last = self._planned[1] if self._is_planned(step + 1) else step + SIGNAL_UPDATES
        self._signalled = False
        with self._warning():
            self._scratch = tempfile.TemporaryDirectory(prefix="t5like-trace-")
            jax.profiler.start_trace(self._scratch.name, profiler_options=_options())
            self._recording = step + 1, last

    def marked(self, step: int) -> contextlib.AbstractContextManager:
        """What update `step` + 1 is made in: a trace then knows its bounds."""
        if self._recording is None:
            return contextlib.nullcontext()
        self._done = step + 1
        return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)

    def end(self) -> None:
        """Ends the trace under way, if any, and says where it is; also when a run is cut short."""
        if self._recording is None:
            return
        first, self._recording = self._recording[0], None
        target = self._folder / f"updates_{first}_{self._done}"
        with self._warning(), self._scratch:
            jax.profiler.stop_trace()
            [trace] = pathlib.Path(self._scratch.name).glob("plugins/profile/*/*.xplane.pb")
            # The profiler's own folder is named by each process's clock, and it writes to local
            # disks only.
            target.mkdir(parents=True, exist_ok=True)
            (target / _name()).write_bytes(trace.read_bytes())
            logging.warning("a trace of updates %d to %d is in %s", first, self._done, target)

    def _is_planned(self, update: int) -> bool:
        return self._planned[0] <= update <= self._planned[1]

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever it is, the training matters more.
            self._planned = (1, 0)
            logging.warning("no trace of updates is recorded: %s", error)


@contextlib.contextmanager
def on_signal(profiler: Profiler) -> Iterator[None]:
    """Lets SIGUSR1 ask for a trace while the block runs, where this thread may handle signals."""
    try:
        previous = signal.signal(signal.SIGUSR1, profiler.request)
    except (ValueError, AttributeError):  # Not the main thread; no such signal on this system.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def checked(updates: Sequence[int]) -> tuple[int, int]:
    """(first, last) of train.profile.

    Raises:
      UserError: it is not two whole numbers, rising from 1.
    """
    whole = isinstance(updates, (tuple, list)) and all(type(value) is int for value in updates)
    if not whole or len(updates) != 2 or not 1 <= updates[0] <= updates[1]:
        raise UserError(
            f"train.profile is {updates!r}; write the first and the last update to trace, counted "
            "from 1, such as (100, 104)"
        )
    return updates[0], updates[1]


def _name() -> str:
    """One file for each process, also where several share a machine."""
    several = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    return f"{socket.gethostname()}{several}.xplane.pb"


def _options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions would fill the trace and slow down what is measured.
    options.python_tracer_level = 0
    return options
