"""Attention on a mesh: each device computes the rows of the batch that it holds.

A Pallas kernel cannot be partitioned by the compiler, and a walk over blocks would be gathered, so
the call is mapped over the mesh by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from kernels import RelativeBias, attention, masks

# The mesh axis that batches are split over, see t5like/training/mesh.py.
DATA = "data"


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: masks.Mask,
    *,
    bias: RelativeBias | None = None,
    **options: Any,
) -> jax.Array:
    """kernels.attention of this device's rows, [B, Q, H, Dh], where the mesh in force splits B.

    Every array of the mask, and of the bias but its table, has the batch first, of size B or 1.
    """

    def call(q, k, v, mask, bias):
        return attention(q, k, v, mask, bias=bias, **options)

    batch = q.shape[0]
    if not _splits(batch):
        return call(q, k, v, mask, bias)
    rows = PartitionSpec(DATA)

    def of(tree: Any) -> Any:
        return jax.tree.map(lambda x: rows if x.shape[0] == batch else PartitionSpec(), tree)

    bias_spec = None if bias is None else dataclasses.replace(of(bias), table=PartitionSpec())
    return jax.shard_map(
        call,
        in_specs=(rows, rows, rows, of(mask), bias_spec),
        out_specs=rows,
        axis_names={DATA},
    )(q, k, v, mask, bias)


def _splits(batch: int) -> bool:
    """Whether the mesh in force splits a batch of so many rows and leaves the splitting to us."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    size = mesh.shape.get(DATA, 1)
    return size > 1 and kinds[DATA] == AxisType.Auto and batch % size == 0
