"""`--topology`: a name becomes devices, here or absent, and what their compiler must be told.

libtpu and XLA's CUDA compiler run on any x86-64 Linux machine: they want a description of the
device, not the device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from launch.compiling.chips import CHIPS, GPUS_PER_HOST, Chip, of_kind, shapes
from t5like.errors import UserError

H100 = pathlib.Path(__file__).with_name("h100.textproto")
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e-256, h100:8, local or local:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """What is compiled for.

    Attributes:
      name: e.g. "v5e:16x16", "h100:8", "local:8".
      chip: what it is made of; None for `local`.
      shape: chips along each dimension of a TPU's torus, or (GPUs,), or (CPU devices,), or ()
        for all devices of this machine.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        if self.chip is None:
            return f"{self.name}, this machine"
        return f"{self.name}, {self.chips} chip{'s' * (self.chips > 1)}"


def parse(name: str) -> Topology:
    """A topology's name: GENERATION:AxB or AxBxC, GENERATION-N, h100:N, local or local:N.

    N of "v5e-N" and "v6e-N" counts chips. N of "v4-N" and "v5p-N" counts TensorCores, two a chip,
    as Cloud TPU's own names do: v5p-128 is 64 chips.

    Raises:
      UserError: no such thing.
    """
    match = re.fullmatch(r"(\w+?)(?:([:-])(\d+(?:x\d+)*))?", name.strip().lower())
    generation, mark, size = match.groups() if match else (None, None, None)
    numbers = tuple(int(n) for n in size.split("x")) if size else ()
    if generation == "local" and len(numbers) <= 1 and 0 not in numbers:
        return Topology(name, None, numbers)
    chip = CHIPS.get(generation)
    if chip is None or not numbers or 0 in numbers:
        raise UserError(
            f"--topology={name}: no such hardware; name one of {', '.join(CHIPS)} with a size, or "
            f"this machine: {EXAMPLES}"
        )
    if chip.platform == "cuda":
        return _gpus(name, chip, numbers)
    if mark == "-" or len(numbers) == 1:
        return _slice(name, chip, numbers, in_cores=mark == "-")
    if chip.dimensions == 3 and len(numbers) == 2:
        numbers = (*numbers, 1)
    if len(numbers) != chip.dimensions:
        raise UserError(
            f"--topology={name}: a {chip.name} slice has {chip.dimensions} dimensions, such as "
            f"{chip.name}:{'x'.join('4' * chip.dimensions)}"
        )
    return Topology(f"{chip.name}:{'x'.join(map(str, numbers))}", chip, numbers)


def _slice(name: str, chip: Chip, numbers: tuple[int, ...], in_cores: bool) -> Topology:
    """The usual shape of a slice that is named by its size."""
    each = chip.cores if in_cores else 1
    chips, rest = divmod(numbers[0], each)
    known = shapes(chip)
    if len(numbers) > 1 or rest or chips not in known:
        sizes = ", ".join(str(n * each) for n in known)
        what = "TensorCores" if each > 1 else "chips"
        raise UserError(
            f"--topology={name}: slices of {chip.name} have {sizes} {what}; other shapes are "
            f"written out, as in {chip.name}:{'x'.join('4' * chip.dimensions)}"
        )
    shape = known[chips]
    return Topology(f"{chip.name}:{'x'.join(map(str, shape))}", chip, shape)


def _gpus(name: str, chip: Chip, numbers: tuple[int, ...]) -> Topology:
    count = math.prod(numbers)
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(
            f"--topology={name}: more than {GPUS_PER_HOST} GPUs are whole hosts, a multiple of "
            f"{GPUS_PER_HOST}"
        )
    return Topology(f"{chip.name}:{count}", chip, (count,))


# --- before jax starts -------------------------------------------------------------------------


def prepare(topology: Topology) -> None:
    """Sets the environment that the compilers read as they load. Call it before importing jax.

    Raises:
      UserError: the compiler is not installed.
    """
    if topology.chip is None:
        if topology.shape:
            os.environ["JAX_PLATFORMS"] = "cpu"
            _add_xla_flags(f"--xla_force_host_platform_device_count={topology.shape[0]}")
        return
    lacking = missing(topology.chip.platform)
    if lacking:
        raise UserError(f"--topology={topology.name}: {lacking}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.platform == "tpu":
        prepare_tpu()
    else:
        prepare_cuda()


def prepare_tpu() -> None:
    """Environment variables of libtpu on a machine without TPUs; set ones stay as they are."""
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


def prepare_cuda() -> None:
    """Where the CUDA compiler is, and no autotuning, which runs candidates on the device."""
    nvcc = _nvcc()
    if nvcc is None:
        return
    _add_xla_flags(f"--xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0")
    os.environ["PATH"] = f"{nvcc / 'bin'}{os.pathsep}{os.environ['PATH']}"


def _add_xla_flags(flags: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _nvcc() -> pathlib.Path | None:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    found = (pathlib.Path(root) / "cuda_nvcc" for root in roots)
    return next((path for path in found if path.is_dir()), None)


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for "tpu" or "cuda" here and what to install, or None."""
    if platform == "tpu":
        wheels, extra = {"libtpu": importlib.util.find_spec("libtpu")}, "tpu"
    else:
        wheels, extra = {
            "jax_cuda12_plugin": importlib.util.find_spec("jax_cuda12_plugin"),
            "nvidia-cuda-nvcc-cu12": _nvcc(),
        }, "cuda12"
    absent = [name for name, found in wheels.items() if not found]
    if not absent:
        return None
    return (
        f"{' and '.join(absent)} not installed: pip install 't5like[{extra}]' (Linux on x86-64), "
        f"in an environment of its own where there is another accelerator's"
    )


# --- devices -----------------------------------------------------------------------------------


def devices(topology: Topology) -> Sequence[Any]:
    """The topology's jax devices.

    Raises:
      UserError: the compiler knows no such shape.
    """
    import jax

    if topology.chip is None:
        return jax.devices()
    from jax.experimental import topologies

    if topology.chip.platform == "cuda":
        return cuda_devices(H100.read_text(), topology.chips)
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}",
            **_host(topology),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {error}") from error


def _host(topology: Topology) -> dict[str, Any]:
    """What of a slice's making libtpu does not take from its name."""
    # v4's two cores appear as one device, as they do on its virtual machines.
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.chips < 4:
        shape = (*topology.shape, 1)[:3]
        options["chips_per_host_bounds"] = shape
    return options


def cuda_devices(config: str, count: int) -> Sequence[Any]:
    """Devices of `count` GPUs with a description in XLA's text format, by hosts of eight."""
    from jax.experimental import topologies

    hosts = max(1, count // GPUS_PER_HOST)
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=f"1x{hosts}x{count // hosts}"
    ).devices


def chip_of(topology: Topology, device: Any) -> Chip | None:
    """What is known of a device: of one here, its own memory limit."""
    if topology.chip is not None:
        return topology.chip
    chip = of_kind(device.device_kind)
    if chip is None:
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(chip, hbm=float(limit)) if limit else chip
