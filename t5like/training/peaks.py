"""Peak matrix-multiply rates of known accelerators, for model FLOPs utilisation."""

from __future__ import annotations

import jax

# Dense bfloat16 FLOPs a second per jax device, from the vendors' data sheets. A TPU v2, v3
# or 7x chip is two jax devices.
_PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOPs a second of a device, None where it is not known (any CPU)."""
    kind = device.device_kind
    if kind.startswith("TPU"):
        return _PEAKS.get(kind)
    known = [name for name in _PEAKS if kind == name or kind.startswith((name + " ", name + "-"))]
    return _PEAKS[max(known, key=len)] if known else None
