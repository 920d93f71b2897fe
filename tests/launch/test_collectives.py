"""No activation is gathered over the batch's axes: compiled in a process with eight devices."""

from __future__ import annotations

import pathlib

from tests import many_devices

# What is sent is settled before the code that these leave out is optimised.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def test_on_eight_devices():
    script = pathlib.Path(__file__).parent / "collectives_on_eight.py"
    many_devices.passed(8, script, flags=FLAGS)
