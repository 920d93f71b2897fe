"""The device mesh: one axis, 'data', over all devices, from the first run on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5like.errors import UserError
from t5like.models.sharding import DATA


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over `devices` (all by default); enter it with `jax.set_mesh`.

    Axes are Auto: under Explicit ones flax.linen's embedding lookups fail.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """Axis 0 is split over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Copies a host batch to the devices, axis 0 split over them; an explicit transfer.

    Args:
      batch: {feature: [B, ...]}; in a run of several processes, this process's rows.

    Raises:
      UserError: the rows do not divide among the devices.
    """
    sharding = over_data(mesh)
    devices = len(sharding.addressable_devices)
    for name, value in batch.items():
        if value.shape[0] % devices:
            raise UserError(
                f"{value.shape[0]} rows of {name!r} do not divide among {devices} devices: "
                "make the batch size a multiple of the device count"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of host arrays to every device; an explicit transfer."""
    return jax.device_put(tree, replicated(mesh))
