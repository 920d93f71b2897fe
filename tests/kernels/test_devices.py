"""Backends under shard_map, on four devices, in a process of its own that has them."""

from __future__ import annotations

import pathlib

from tests import many_devices

ROOM = pathlib.Path(__file__).parent


def test_shard_map_on_four_devices():
    classes = ("test_tpu.py::TestTpu", "test_triton.py::TestTriton", "test_xla.py::TestXla")
    said = many_devices.passed(4, *(f"{ROOM / name}::test_shard_map" for name in classes))
    assert "3 passed" in said, said
