"""The tests that take eight devices, in a process of its own that has them."""

from __future__ import annotations

import pathlib

from tests import many_devices


def test_on_eight_devices():
    many_devices.passed(8, pathlib.Path(__file__).parent / "on_eight_devices.py")
