"""Every option of the overlap page for the H100 is known to XLA, and they pipeline collectives."""

import re

import numpy as np
from jax.sharding import Mesh

from launch.compiling import topology
from tests.hardware import overlap

PLATFORM = "cuda"  # conftest.py prepares its compiler.


def started(compiled) -> int:
    """Collectives that begin in one place of the program and end in another."""
    starts = r"(?:all-gather|all-reduce|reduce-scatter|async)-start"
    return len(re.findall(starts, compiled.as_text()))


def test_the_pages_options_are_known_and_pipeline_the_collectives():
    eight = topology.cuda_devices(topology.H100.read_text(), 8)
    lowered = overlap.fully_sharded_step(Mesh(np.array(eight), ("data",)))
    with_page = lowered.compile(compiler_options=overlap.options("h100"))  # Unknown: raises.
    assert started(with_page) > started(lowered.compile())
