"""No activation is gathered over the batch's axes: compiled in a process with eight devices."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOM = pathlib.Path(__file__).parent
# What is sent is settled before the code that these leave out is optimised.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def test_on_eight_devices():
    environment = {**os.environ, "XLA_FLAGS": FLAGS}
    script = str(ROOM / "collectives_on_eight.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", script],
        env=environment, cwd=ROOM.parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
