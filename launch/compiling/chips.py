"""Accelerators as data: memory, rates and links, per jax device.

Sources, read in November 2026: TPUs, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}
(bandwidth of memory and of inter-chip links); H100, NVIDIA's data sheet of the SXM5 module and of
the DGX H100 (NVLink, one 400 Gb/s adapter a GPU). Peak FLOPs are t5like/training/peaks.py's. `hbm`
is what the compiler lets a program use, as it says itself when one does not fit.
"""

from __future__ import annotations

import dataclasses

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Bytes, and bytes a second, of a jax device.

    Attributes:
      name: the generation, as topologies call it.
      platform: "tpu" or "cuda".
      kind: device_kind as jax reports it.
      dimensions: of a topology's shape, 2 or 3; of a GPU cluster 1.
      hbm: memory that a program can use.
      hbm_bandwidth: of that memory.
      link: one direction of one link: of a TPU's torus, of NVLink (all links together).
      ring: a torus dimension of a multiple of so many chips wraps round.
      network: of one direction of a device's share of the network between hosts (GPUs) or
        slices (TPUs).
      devices: jax devices a chip.
      cores: TensorCores a chip, which the names of v4 and v5p slices count.
    """

    name: str
    platform: str
    kind: str
    dimensions: int
    hbm: float
    hbm_bandwidth: float
    link: float
    ring: int
    network: float
    devices: int = 1
    cores: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", 3, 30.75 * GIB, 1228e9, 50e9, 4, 6.25e9, cores=2),
        Chip("v5e", "tpu", "TPU v5 lite", 2, 15.75 * GIB, 819e9, 50e9, 16, 3.1e9),
        Chip("v5p", "tpu", "TPU v5", 3, 95.74 * GIB, 2765e9, 100e9, 4, 6.25e9, cores=2),
        Chip("v6e", "tpu", "TPU v6 lite", 2, 31.25 * GIB, 1600e9, 100e9, 16, 12.5e9),
        Chip("tpu7x", "tpu", "TPU7x", 3, 94.75 * GIB, 3690e9, 50e9, 4, 6.25e9, devices=2, cores=2),
        # Of 79.1 GiB, what XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives it; 0.75 is jax's default.
        Chip("h100", "cuda", "NVIDIA H100", 1, 75.1 * GIB, 3352e9, 450e9, 1, 50e9),
    )
}
# GPUs of a host.
GPUS_PER_HOST = 8
# Chips -> the shape of a slice that has so many, as Cloud TPU makes them.
SQUARES = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}  # fmt: skip
CUBES = {
    1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4),
    128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
    4096: (16, 16, 16),
}  # fmt: skip


def shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Chips -> shape of a TPU's slice."""
    return SQUARES if chip.dimensions == 2 else CUBES


def of_kind(kind: str) -> Chip | None:
    """The chip of a device_kind, None where it is not known."""
    kind = "TPU v5" if kind == "TPU v5p" else kind
    for chip in CHIPS.values():
        if kind == chip.kind or (chip.platform == "cuda" and kind.startswith(f"{chip.kind} ")):
            return chip
    return None
