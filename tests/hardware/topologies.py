"""Devices that this machine lacks, as their compilers see them.

libtpu and XLA's CUDA compiler run on any x86-64 Linux machine: they want a description of the
device, not the device. `requirements/tpu.txt` and `requirements/cuda.txt` pin them, one
environment each, because both register themselves with jax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.compiling import topology

# One topology of each generation, the smallest that its compiler knows.
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# By what of an H100's description they differ from it.
GPUS = {
    "h100": {},
    "a100": {
        "NVIDIA H100 80GB HBM3": "NVIDIA A100-SXM4-80GB",
        "cuda_compute_capability { major: 9 }": "cuda_compute_capability { major: 8 }",
        "core_count: 132": "core_count: 108",
        "fpus_per_core: 128": "fpus_per_core: 64",
        "shared_memory_per_block_optin: 232448": "shared_memory_per_block_optin: 166912",
        "shared_memory_per_core: 233472": "shared_memory_per_core: 167936",
    },
    "t4": {
        "NVIDIA H100 80GB HBM3": "Tesla T4",
        "cuda_compute_capability { major: 9 }": "cuda_compute_capability { major: 7 minor: 5 }",
        "core_count: 132": "core_count: 40",
        "fpus_per_core: 128": "fpus_per_core: 64",
        "shared_memory_per_block_optin: 232448": "shared_memory_per_block_optin: 65536",
        "shared_memory_per_core: 233472": "shared_memory_per_core: 65536",
    },
}
def _prepare() -> None:
    """Sets what the compilers read as they load, which is when a topology is first asked for."""
    jax.config.update("jax_platforms", "cpu")
    topology.prepare_tpu()
    topology.prepare_cuda()


_prepare()
missing = topology.missing


@functools.cache
def tpu(generation: str, devices: int = 1) -> Mesh:
    """A mesh ("data",) over the first devices of a TPU topology."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[generation])
    return Mesh(np.array(found.devices[:devices]), ("data",))


@functools.cache
def gpu(name: str = "h100") -> Mesh:
    """A mesh ("data",) of one of GPUS."""
    config = topology.H100.read_text()
    for old, new in GPUS[name].items():
        assert config.count(old) == 1, f"{topology.H100.name} does not say {old!r} once"
        config = config.replace(old, new)
    return Mesh(np.array(topology.cuda_devices(config, 1)), ("data",))


def lower(mesh: Mesh, function: Callable, *shapes: Sequence) -> jax.stages.Lowered:
    """Lowers function(*arguments) for the mesh; shapes are ShapeDtypeStructs, or pytrees of them.

    The mesh is also the ambient one, which is how kernels.attention learns what it compiles for.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or replicated
        ),
        shapes,
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments)
