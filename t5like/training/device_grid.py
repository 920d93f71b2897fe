"""Which device stands where in a mesh: neighbours along its last axes have the fastest links."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from t5like.errors import UserError


def device_grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of shape `sizes`, the first of which counts what slices divide.

    On GPUs a host is a slice and hosts come one after another, so that the last axes stay within
    one as long as they divide its devices. TPUs are laid along their torus; a slice of them is
    joined to another along the first axis only.

    Args:
      sizes: of the mesh's axes, slowest links first; their product is the number of devices.

    Raises:
      UserError: the first size does not divide among several slices of TPUs, or the devices are
        no whole part of a torus.
    """
    platform = devices[0].platform
    if platform == "cpu":
        return _array(devices, sizes)
    if platform != "tpu":
        return _array(sorted(devices, key=_place), sizes)
    slices = len({_slice(device) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"Sharding.replica={sizes[0]} does not divide among the {slices} slices of these "
            f"{len(devices)} TPUs, which a slow network joins: make it a multiple of {slices}"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]),
            (slices,) + (1,) * (len(sizes) - 1),
            devices,
            allow_split_physical_axes=True,
        )
    except (ValueError, NotImplementedError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"Sharding: {' * '.join(map(str, sizes))} cannot be laid on these {len(devices)} TPUs "
            f"({said or type(error).__name__}): choose other sizes, or all devices of a slice"
        ) from error


def _array(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    grid = np.empty(math.prod(sizes), object)
    grid[:] = devices
    return grid.reshape(sizes)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _place(device: jax.Device) -> tuple[int, int, int]:
    return _slice(device), device.process_index, device.id
