"""SIGTERM: a flag that the loop looks at, and the exception it then ends with."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Preempted(Exception):
    """The run was asked to stop and its state is saved; command lines exit with `exit_status`."""

    exit_status = 143

    def __init__(self, step: int):
        super().__init__(
            f"stopped by SIGTERM at step {step}; the state is saved: run the same command again "
            "to go on"
        )
        self.step = step


class StopFlag:
    """Whether the process has been asked to stop."""

    def __init__(self):
        self.requested = False

    def request(self, *_) -> None:
        """Asks; a signal handler."""
        self.requested = True


@contextlib.contextmanager
def catch_sigterm() -> Iterator[StopFlag]:
    """Turns SIGTERM into a flag while the block runs, where this thread may handle signals.

    A signal that comes while a program compiles or a save is under way is seen right after.
    """
    flag = StopFlag()
    try:
        previous = signal.signal(signal.SIGTERM, flag.request)
    except ValueError:  # Not the main thread: whoever owns it handles signals.
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)
