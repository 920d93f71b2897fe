"""What worker processes of several rooms share."""

from __future__ import annotations

import multiprocessing
import os
import threading


def die_with_parent() -> None:
    """Ends this process when its parent is killed; a pool would leave it waiting for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
