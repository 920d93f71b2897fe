"""Bias inside a kernel: its values in one tile."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bias import Array, Buckets, Distances, Lowered
from kernels.block_sparse_attention.triton.tiles import Tile

_COPY_BYTES = 16  # the widest copy from global to shared memory


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["zero", "descending"]
)
@dataclasses.dataclass(frozen=True)
class Shifted:
    """Values by distance, held so that any row of any tile starts at a multiple of 16 bytes.

    A row of a tile is a run of values whose start moves by one from row to row. Copies of runs
    that may start anywhere go 4 bytes at a time; here the copy is chosen in which the run starts
    at a multiple of 16 bytes, and so go 16.

    Attributes:
      values: [H, copies, W]: copy s is the values from the s-th on.
      zero: where distance 0 stands.
      descending: distances fall along an axis of queries, for transposed tiles.
    """

    values: Any
    zero: int
    descending: bool

    def in_tile(self, tile: Tile) -> jax.Array:
        if self.descending:
            start = self.zero - tile.kv_slot + tile.q_start
            length = tile.q
        else:
            start = self.zero - tile.q_slot + tile.kv_start
            length = tile.kv
        copies = jnp.int32(self.values.shape[1])
        copy = jax.lax.rem(start, copies)
        along = jnp.arange(length, dtype=jnp.int32)[None, :]
        return self.values[tile.head, copy, jax.lax.div(start, copies) * copies + along]


KernelBias = Shifted | Buckets | Array | None


def for_kernel(bias: Lowered, q_len: int, *, transposed: bool) -> KernelBias:
    """What a kernel reads of a bias over q_len queries, padding included."""
    if not isinstance(bias, Distances):
        return bias
    values, zero = bias.values, q_len
    if transposed:
        values, zero = values[:, ::-1], values.shape[1] - 1 - q_len
    copies = _COPY_BYTES // values.dtype.itemsize
    # A tile may lie beside the last distance, by less than a tile.
    width = -(-values.shape[1] // 128) * 128 + 256
    values = jnp.pad(values, ((0, 0), (0, width + copies - values.shape[1])))
    shifted = jnp.stack([values[:, s : s + width] for s in range(copies)], 1)
    return Shifted(shifted, zero, transposed)


def bias_values(bias: KernelBias, tile: Tile) -> jax.Array:
    """float32 that broadcasts over the tile. bias: of refs."""
    if isinstance(bias, Shifted):
        values = bias.in_tile(tile)
    elif isinstance(bias, Buckets):
        values = bias.table[buckets(bias, tile), tile.head]
    elif bias.array.shape[2] == 1:
        values = tile.along_kv(bias.array[(*tile.group(bias.array), 0, tile.keys)])
    else:
        values = tile.turned(bias.array[(*tile.group(bias.array), tile.queries, tile.keys)])
    return values.astype(jnp.float32)


def buckets(bias: Buckets, tile: Tile) -> jax.Array:
    """int32, as the tile lies: rows of the table."""
    q_position, kv_position = (
        along(ref[tile.batch if ref.shape[0] > 1 else 0, slots])
        for ref, slots, along in (
            (bias.q_positions, tile.queries, tile.along_q),
            (bias.kv_positions, tile.keys, tile.along_kv),
        )
    )
    return bias.index(kv_position - q_position)


def staged_bytes(bias: Lowered) -> int:
    """Bytes of shared memory that a bias takes per element of a tile and stage of copies."""
    if bias is None or (isinstance(bias, Array) and bias.array.shape[2] == 1):
        return 0
    leaf = jax.tree.leaves(bias)[0]
    return np.dtype(leaf.dtype).itemsize
