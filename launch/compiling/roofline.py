"""How long a step would take at the hardware's published rates: an estimate and its assumptions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from launch.compiling.chips import GPUS_PER_HOST, Chip
from launch.compiling.collectives import Collective
from launch.compiling.counts import Counts
from launch.compiling.topology import Topology
from t5like.training.peaks import peak_flops

ASSUMPTIONS = (
    "an estimate, which a step may miss on either side: memory traffic is counted from above, "
    "rates and overlap are ideal",
    "products at 100% of the bf16 peak, memory at 100% of its bandwidth; each operation takes the "
    "longer of the two",
    "bytes as every operation reads its operands and writes its result in main memory once",
    "collectives by ring algorithms at 100% of the links along their mesh axes; latency is free",
    "at best asynchronous collectives hide behind operations wholly, at worst nothing hides",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call on one device, estimated, see ASSUMPTIONS.

    Attributes:
      products: FLOPs at peak.
      memory: bytes at the memory's bandwidth.
      operations: the longer of the two, operation by operation.
      collectives: mesh axes ("data", "data+fsdp") -> seconds of their links.
      asynchronous: of those seconds, what may run beside operations.
      best, worst: the call, with all overlap that is possible and with none.
      mfu: model FLOPs over peak in `best` and in `worst`; None where they are not known.
    """

    products: float
    memory: float
    operations: float
    collectives: Mapping[str, float]
    asynchronous: float
    best: float
    worst: float
    mfu: tuple[float, float] | None


def estimate(
    counts: Counts, chip: Chip, topology: Topology, mesh: jax.sharding.Mesh, model_flops: float
) -> Roofline | None:
    """The roofline of a program; None for a device whose peak is not known.

    Args:
      model_flops: of one call over all devices; NaN where they are not known.
    """
    peak = peak_flops(mesh.devices.flat[0])
    if not peak:
        return None
    operations = sum(
        op.times * max(op.flops / peak, op.bytes / chip.hbm_bandwidth) for op in counts.operations
    )
    seconds: dict[str, float] = {}
    hidden = 0.0
    for collective in counts.collectives:
        took = collective.total / bandwidth(collective, chip, topology, mesh)
        name = "+".join(collective.axes) or "irregular"
        seconds[name] = seconds.get(name, 0.0) + took
        hidden += took if collective.asynchronous else 0.0
    together = sum(seconds.values())
    best, worst = max(operations, hidden) + together - hidden, operations + together
    ideal = model_flops / mesh.size / peak
    mfu = (ideal / best, ideal / worst) if best and not math.isnan(ideal) else None
    return Roofline(
        counts.flops / peak, counts.bytes / chip.hbm_bandwidth, operations, seconds, hidden,
        best, worst, mfu,
    )  # fmt: skip


def bandwidth(
    collective: Collective, chip: Chip, topology: Topology, mesh: jax.sharding.Mesh
) -> float:
    """Bytes a second that a device sends along a collective's axes.

    On a TPU each dimension of the torus that the axes run along gives a ring, whose two directions
    both carry; a dimension that does not close, or that is not taken whole, counts half. On GPUs
    it is NVLink within a host and the network beyond.
    """
    devices = _along(mesh, collective.axes)
    if chip.platform == "cuda":
        hosts = {getattr(device, "process_index", 0) for device in devices}
        return chip.link if len(devices) <= GPUS_PER_HOST and len(hosts) <= 1 else chip.network
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return chip.network
    coordinates = np.array([device.coords for device in devices])
    links = 0
    for dimension, size in enumerate(topology.shape or coordinates.max(0) + 1):
        taken = len(set(coordinates[:, dimension])) if dimension < coordinates.shape[1] else 1
        if taken > 1:
            links += 2 if taken == size and size % chip.ring == 0 else 1
    # Two cores of one chip speak through their memory.
    return links * chip.link if links else chip.hbm_bandwidth / 2


def _along(mesh: jax.sharding.Mesh, axes: Sequence[str]) -> list:
    """Devices of the group that the first device is in."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(np.asarray(mesh.devices[index]).flat) if axes else list(mesh.devices.flat)
