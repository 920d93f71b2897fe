"""SIGTERM: a flag that the loop looks at, and the exception it then ends with."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from t5like.training import distributed


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
    """Whether this process has been asked to stop, and whether all of them do."""

    def __init__(self):
        self.requested = False

    def request(self, *_) -> None:
        """Asks; a signal handler."""
        self.requested = True
        distributed.want("stop")

    def agreed(self) -> bool:
        """Whether to stop here.

        Of several processes all have the same answer, as long as all ask equally often: any one
        that has been asked to stop stops all, a few questions later.
        """
        agreement = distributed.agreement("stop")
        return self.requested if agreement is None else agreement.check()


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
