"""Over which axes of the mesh in force a call of attention is split."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from kernels import RelativeBias, masks
from kernels.block_sparse_attention.count import load_of_parts
from t5like.errors import UserError
from t5like.models.partitioning import devices_of, mesh_axes, rules_in_force

# Queries are swapped where that shortens the slowest device's work by so much, and where the halves
# have so many slots, of kernels' smallest blocks.
WORTH_A_SWAP = 1.2
SMALLEST_HALF = 128

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes that a call is split over.

    Attributes:
      manual: all that are the compiler's, or it would not take a kernel; arrays are whole along
        those not named below.
      batch, heads, queries, keys: of q's and k's axes.
      kv_heads: `heads`, or () where each device reads one kv head of those that all hold.
    """

    manual: Axes
    batch: Axes
    heads: Axes
    kv_heads: Axes
    queries: Axes
    keys: Axes

    @staticmethod
    def of(q: jax.Array, k: jax.Array) -> Layout | None:
        """None where nothing is to be split."""
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        manual = {name: size for name, size, kind in kinds if kind == AxisType.Auto}
        if set(manual.values()) <= {1} or not rules_in_force():
            return None
        heads = _head_axes(q.shape[2], k.shape[2])
        queries = mesh_axes("length", q.shape[1])
        return Layout(
            manual=tuple(manual),
            batch=mesh_axes("batch", q.shape[0]),
            heads=heads,
            kv_heads=heads if k.shape[2] % devices_of(heads) == 0 else (),
            queries=queries,
            keys=mesh_axes("length", k.shape[1]) if queries else (),
        )

    @property
    def of_arrays(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Of q, k and v."""
        keys = _spec(self.batch, self.keys, self.kv_heads)
        return _spec(self.batch, self.queries, self.heads), keys, keys

    def splits_rows(self, x: Any, batch: int) -> bool:
        return bool(self.batch) and x.shape[0] == batch

    def rows(self, x: Any, batch: int, *more: Axes) -> PartitionSpec:
        """Of an array whose first axis is `batch` or 1 long."""
        return _spec(self.batch if self.splits_rows(x, batch) else (), *more)

    def of_bias(self, bias: RelativeBias | None, batch: int) -> RelativeBias | None:
        if bias is None:
            return None
        q, kv = bias.q_positions, bias.kv_positions
        return dataclasses.replace(
            bias,
            table=_spec((), self.heads),
            q_positions=None if q is None else self.rows(q, batch, self.queries),
            kv_positions=None if kv is None else self.rows(kv, batch),
        )

    def swaps_queries(self, mask: masks.Mask, q_len: int, kv_len: int) -> bool:
        """Whether devices that lie opposite share the work of their queries."""
        devices = devices_of(self.queries)
        if devices == 1 or q_len % (2 * devices) or q_len < 2 * devices * SMALLEST_HALF:
            return False
        halves = load_of_parts(mask, q_len, kv_len, 2 * devices).reshape(devices, 2)
        swapped = halves[:, 0] + halves[::-1, 1]
        return bool(halves.sum(1).max() > WORTH_A_SWAP * swapped.max())


def _head_axes(heads: int, kv_heads: int) -> Axes:
    """What "heads" is split over; kv heads divide likewise, or devices share whole ones."""
    axes = mesh_axes("heads")
    devices = devices_of(axes)
    where = f"Sharding.{' x Sharding.'.join(axes)} = {devices}"
    if heads % devices:
        raise UserError(
            f"ModelConfig.num_heads = {heads} does not divide among {where}: choose a divisor of it"
        )
    if kv_heads % devices and devices % kv_heads:
        raise UserError(
            f"ModelConfig.num_kv_heads = {kv_heads} neither divides among {where} nor divides it: "
            f"choose a divisor or a multiple of {kv_heads} for the mesh, or other kv heads"
        )
    return axes


def _spec(*axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in axes))
