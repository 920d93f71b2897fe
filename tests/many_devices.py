"""Tests that take several devices, in a process of its own that has them (CPU devices)."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def environment(devices: int, flags: str = "") -> dict[str, str]:
    """This process's, with so many CPU devices and further XLA flags."""
    own = f"--xla_force_host_platform_device_count={devices} {flags}".strip()
    path = os.pathsep.join([str(ROOT), *sys.path])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": own, "PYTHONPATH": path}


def run(devices: int, *arguments: str, flags: str = "") -> subprocess.CompletedProcess:
    """Python with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(devices, flags), cwd=ROOT,
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def passed(devices: int, *tests: str | pathlib.Path, flags: str = "") -> str:
    """What pytest prints of these tests, which all must pass; none may be skipped."""
    done = run(devices, "-m", "pytest", "-p", "no:xdist", *map(str, tests), flags=flags)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    return done.stdout
