"""Sharding: the mesh of a run and what lies where on it.

One mesh with named axes for every run. Batches are split over "replica", "data" and "fsdp";
parameters over "fsdp" (fully sharded data parallelism, ZeRO stage 3: Rajbhandari et al. 2020) and
"tensor" (Shoeybi et al. 2019, "Megatron-LM"); rows, by their length, over "sequence". What follows
from that is the compiler's (GSPMD, Xu et al. 2021).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5like.errors import UserError
from t5like.models.partitioning import MESH_AXES, Rules
from t5like.training import sharding_rules
from t5like.training.device_grid import device_grid


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How many devices each axis of the mesh has, and which logical axes lie on it.

    Attributes:
      replica: slices or pods that a slow network joins; batches are split over them, parameters
        are not. A multiple of the slices that there are is no error: it divides a slice too.
      data: parts of a batch whose parameters are copies; -1: what the others leave over.
      fsdp: parts of a batch that also divide the parameters and the optimiser's state.
      sequence: parts of each row (context parallelism).
      tensor: parts of heads, feed-forward width and vocabulary.
      rules: {logical axis: mesh axis, list of them, or None}, over DEFAULT_RULES of
        t5like/models/partitioning.py.
    """

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    rules: Mapping[str, str | Sequence[str] | None] | None = None

    def __post_init__(self):
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool):
                raise UserError(f"Sharding.{axis} is {size!r}; it must be an int")
            if size < 1 and size != -1:
                raise UserError(
                    f"Sharding.{axis} is {size}; it must be at least 1, or -1 for the devices "
                    "that the other axes leave over"
                )
        left = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        if len(left) > 1:
            raise UserError(
                f"Sharding.{left[0]} and Sharding.{left[1]} are both -1: one of them at most can "
                "be what the other axes leave over"
            )
        _ = self.logical_rules

    @functools.cached_property
    def logical_rules(self) -> Rules:
        """Logical axis -> mesh axes, defaults included."""
        return sharding_rules.over_defaults(self.rules)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (all by default), with the axes MESH_AXES.

        Axes are Auto: under Explicit ones flax.linen's embedding lookups fail.

        Raises:
          UserError: the sizes do not multiply to the number of devices or do not fit where they
            are, or the rules put two axes of one array on one of the mesh.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self._sizes(len(devices))
        kinds = (AxisType.Auto,) * len(MESH_AXES)
        mesh = Mesh(device_grid(sizes, devices), MESH_AXES, axis_types=kinds)
        sharding_rules.check_collisions(functools.partial(self.axes, mesh))
        return mesh

    def _sizes(self, devices: int) -> tuple[int, ...]:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        said = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
        fixed = math.prod(size for size in sizes.values() if size > 0)
        if -1 in sizes.values():
            sizes = {a: devices // fixed if size == -1 else size for a, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            raise UserError(
                f"Sharding: {said} = {fixed} does not fit the {devices} devices here: the sizes of "
                f"{', '.join(MESH_AXES)} must multiply to {devices}, or one be -1 and the others "
                "divide it"
            )
        return tuple(sizes.values())

    @contextlib.contextmanager
    def in_force(self, mesh: Mesh) -> Iterator[Mesh]:
        """What is traced in this block is laid out on `mesh` by these rules."""
        with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(self.logical_rules.items())):
            yield mesh

    def spec(self, mesh: Mesh, names: Sequence[str | None]) -> PartitionSpec:
        """Where an array lies whose axes have these names; axes of one device are left out."""
        return PartitionSpec(*(self.axes(mesh, name) or None for name in names))

    def axes(self, mesh: Mesh, name: str | None) -> tuple[str, ...]:
        """The axes of several devices over which the logical axis `name` is split."""
        return tuple(a for a in self.logical_rules.get(name, ()) if mesh.shape[a] > 1)

    def parts(self, mesh: Mesh, name: str | None) -> int:
        """Into how many parts the logical axis `name` is split."""
        return math.prod(mesh.shape[axis] for axis in self.axes(mesh, name))

    def of_parameters(self, mesh: Mesh, names: Any, shapes: Any) -> Any:
        """A NamedSharding for each parameter.

        Args:
          names: nested dict of tuples of logical axes, see partitioning.names_of.
          shapes: the same tree of anything with a shape.

        Raises:
          UserError: two axes of a parameter on one axis of the mesh, or a size that does not
            divide.
        """
        named = traverse_util.flatten_dict(names)
        placed = {
            path: NamedSharding(mesh, self._checked(mesh, path, named[path], leaf.shape))
            for path, leaf in traverse_util.flatten_dict(shapes).items()
        }
        return traverse_util.unflatten_dict(placed)

    def _checked(self, mesh: Mesh, path, names, shape) -> PartitionSpec:
        owners: dict[str, str] = {}
        for name, size in zip(names, shape, strict=True):
            axes, parts = self.axes(mesh, name), self.parts(mesh, name)
            for axis in axes:
                if axis in owners:
                    raise UserError(
                        f"Sharding.rules puts both {owners[axis]!r} and {name!r} on {axis!r}, and "
                        f"the parameter {'/'.join(path)} has both: move one of them"
                    )
                owners[axis] = name
            if size % parts:
                sizes = " * ".join(f"Sharding.{axis}={mesh.shape[axis]}" for axis in axes)
                raise UserError(
                    f"the axis {name!r} of parameter {'/'.join(path)}, {size} long, does not "
                    f"divide into {parts} ({sizes}): choose a divisor, or keep the axis whole with "
                    f"Sharding.rules = {{{name!r}: None}}"
                )
        return self.spec(mesh, names)

    # --- batches ---

    def of_batch(self, mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
        """Where a feature [B, ...] lies: rows over the batch's axes, a last axis of tokens over
        the sequence's where it divides."""
        names = ["batch"] + [None] * (len(shape) - 1)
        if len(shape) > 1 and shape[-1] % self.parts(mesh, "length") == 0:
            names[-1] = "length"
        return NamedSharding(mesh, self.spec(mesh, names))

    def check_batch(self, mesh: Mesh, rows: int, lengths: Sequence[int], accumulate: int) -> None:
        """Raises UserError where a batch does not divide among the devices."""
        parts = self.parts(mesh, "batch")
        if rows % (parts * accumulate):
            raise UserError(
                f"train.batch_size={rows} does not divide into train.accumulate={accumulate} times "
                f"{parts} parts, the devices along {' * '.join(self.logical_rules['batch'])}: make "
                f"it a multiple of {parts * accumulate}"
            )
        parts = self.parts(mesh, "length")
        for length in lengths:
            if length % parts:
                raise UserError(
                    f"rows of {length} tokens do not divide into Sharding.sequence={parts} parts: "
                    f"make train.length (and train.targets_length) multiples of {parts}"
                )

    def local_rows(self, mesh: Mesh, rows: int) -> tuple[range, ...]:
        """The rows of a global batch that devices of this process hold, as rising ranges."""
        held = self.of_batch(mesh, (rows,)).addressable_devices_indices_map((rows,)).values()
        merged: list[range] = []
        for start, stop in sorted({index[0].indices(rows)[:2] for index in held}):
            if merged and merged[-1].stop == start:
                start = merged.pop().start
            merged.append(range(start, stop))
        return tuple(merged)

    def put_batch(self, mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copies a host batch to the devices; an explicit transfer.

        Args:
          batch: {feature: [B, ...]}: all rows, or, in a run of several processes, `local_rows`.

        Raises:
          UserError: the rows do not divide among the devices.
        """
        parts = self.parts(mesh, "batch")
        if jax.process_count() == 1:
            for name, value in batch.items():
                if value.shape[0] % parts:
                    raise UserError(
                        f"{value.shape[0]} rows of {name!r} do not divide into the {parts} parts "
                        "of this mesh: make the batch size a multiple of that"
                    )
            shardings = {name: self.of_batch(mesh, value.shape) for name, value in batch.items()}
            return jax.device_put(dict(batch), shardings)
        mine = sum(map(len, self.local_rows(mesh, parts)))
        return {name: self._put_rows(mesh, v, len(v) * parts // mine) for name, v in batch.items()}

    def _put_rows(self, mesh: Mesh, value: np.ndarray, rows: int) -> jax.Array:
        """This process's rows of a feature -> the global array of `rows` rows."""
        places, offset = {}, 0
        for part in self.local_rows(mesh, rows):
            places |= {row: offset + i for i, row in enumerate(part)}
            offset += len(part)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return value[(slice(places[start], places[start] + stop - start), *index[1:])]

        shape = (rows, *value.shape[1:])
        # Unlike jax.device_put, this does not count as an explicit transfer.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback(shape, self.of_batch(mesh, shape), piece)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of host arrays to every device; an explicit transfer."""
    return jax.device_put(tree, replicated(mesh))
