"""Backends under shard_map, on four devices, in a process of its own that has them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOM = pathlib.Path(__file__).parent


def test_shard_map_on_four_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist"]
    classes = ("test_tpu.py::TestTpu", "test_triton.py::TestTriton", "test_xla.py::TestXla")
    tests = [f"{ROOM / name}::test_shard_map" for name in classes]
    found = subprocess.run(
        [*command, *tests],
        env=environment,
        cwd=ROOM.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert "3 passed" in found.stdout and "skipped" not in found.stdout, found.stdout
