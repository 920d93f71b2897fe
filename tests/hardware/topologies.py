"""Devices that this machine lacks, as their compilers see them.

libtpu and XLA's CUDA compiler run on any x86-64 Linux machine: they want a description of the
device, not the device. `requirements/tpu.txt` and `requirements/cuda.txt` pin them, one
environment each, because both register themselves with jax.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
_H100 = pathlib.Path(__file__).with_name("h100.textproto")
_NVCC = importlib.util.find_spec("nvidia") and next(
    (
        path
        for root in importlib.util.find_spec("nvidia").submodule_search_locations
        if (path := pathlib.Path(root) / "cuda_nvcc").is_dir()
    ),
    None,
)


def _prepare() -> None:
    """Sets what the compilers read as they load, which is when a topology is first asked for."""
    jax.config.update("jax_platforms", "cpu")
    environment = {
        # libtpu otherwise asks a metadata server what machine this is.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_LOG": "0",
        # Its lock file would let a single process on the machine compile.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if _NVCC is not None:
        # Autotuning runs candidates on the device.
        flags = f"--xla_gpu_cuda_data_dir={_NVCC} --xla_gpu_autotune_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ["PATH"] = f"{_NVCC / 'bin'}{os.pathsep}{os.environ['PATH']}"


_prepare()


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for "tpu" or "cuda" here, or None where it can."""
    if platform == "tpu":
        wheels = {"libtpu": importlib.util.find_spec("libtpu")}
    else:
        wheels = {
            "jax_cuda12_plugin": importlib.util.find_spec("jax_cuda12_plugin"),
            "nvidia-cuda-nvcc-cu12": _NVCC,
        }
    absent = [name for name, found in wheels.items() if not found]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed: `make hardware` does, where there are wheels"


@functools.cache
def tpu(generation: str, devices: int = 1) -> Mesh:
    """A mesh ("data",) over the first devices of a TPU topology."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[generation])
    return Mesh(np.array(topology.devices[:devices]), ("data",))


@functools.cache
def gpu(name: str = "h100") -> Mesh:
    """A mesh ("data",) of one of GPUS."""
    config = _H100.read_text()
    for old, new in GPUS[name].items():
        assert config.count(old) == 1, f"{_H100.name} does not say {old!r} once"
        config = config.replace(old, new)
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("data",))


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
