"""The tests that take eight devices, in a process of its own that has them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOM = pathlib.Path(__file__).parent


def test_on_eight_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(ROOM / "on_eight_devices.py")]
    found = subprocess.run(
        command,
        env=environment,
        cwd=ROOM.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-5000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout, found.stdout
