"""A mask of whole rows, for a device that holds a part of their queries or of their heads."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.masks.base import Array, Builder, Mask, per_slot
from kernels.masks.expression import Expr


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "query", "head"],
    meta_fields=["queries", "heads"],
)
@dataclasses.dataclass(frozen=True)
class Part(Mask):
    """Some of a mask's queries and heads: one of equal, contiguous parts of each.

    Which part it is may be known on the device alone, as the index of a mesh axis is. What each
    part would show is then still known on the host, so that no part pays for another's blocks.

    Attributes:
      mask: over `queries` times as many queries and `heads` times as many heads.
      query: int or int32 scalar, which part of the queries.
      queries: of how many.
      head, heads: likewise of the heads.
    """

    mask: Mask
    query: int | jax.Array = 0
    queries: int = 1
    head: int | jax.Array = 0
    heads: int = 1

    def expression(self, build: Builder) -> Expr:
        return self.mask.expression(_PartBuilder(build, self))

    def row_bound(self, block_q: int, block_kv: int) -> float:
        return self.mask.row_bound(block_q, block_kv)

    def choices(self) -> tuple[tuple[Mask, ...], int | jax.Array]:
        if not isinstance(self.query, jax.Array):
            return (self,), 0
        parts = (dataclasses.replace(self, query=part) for part in range(self.queries))
        return tuple(parts), self.query


class _PartBuilder(Builder):
    """Hands the part's operands over."""

    def __init__(self, build: Builder, part: Part):
        super().__init__(build.q_len * part.queries, build.kv_len)
        self.build, self.part = build, part

    def query(self, values: Array | None = None) -> Expr:
        if values is None:
            if self.part.queries == 1:
                return self.build.query()
            slots = np.arange(self.build.q_len, dtype=np.int32)
            return self.build.query(slots + self.part.query * self.build.q_len)
        values = self._heads(per_slot(values, self.q_len, "query"))
        return self.build.query(self._queries(values, -1, self.build.q_len))

    def key(self, values: Array | None = None) -> Expr:
        if values is None:
            return self.build.key()
        return self.build.key(self._heads(per_slot(values, self.kv_len, "key")))

    def pair(self, array: Array) -> Expr:
        return self.build.pair(self._queries(self._heads(array), 2, self.build.q_len))

    def blocks(self, pattern: Array, block_q: int, block_kv: int) -> Expr:
        # Parts that end within a block of the pattern take smaller blocks of it.
        size = math.gcd(block_q, self.build.q_len)
        xp = np if isinstance(pattern, np.ndarray) else jnp
        pattern = xp.repeat(self._heads(pattern), block_q // size, axis=2)
        pattern = self._queries(pattern, 2, self.build.q_len // size)
        return self.build.blocks(pattern, size, block_kv)

    def _queries(self, array: Array, axis: int, length: int) -> Array:
        if self.part.queries == 1:
            return array
        return _slice(array, self.part.query, length, axis)

    def _heads(self, array: Array) -> Array:
        """[B or 1, heads * H or 1, ...] -> [B or 1, H or 1, ...]."""
        if self.part.heads == 1 or array.shape[1] == 1:
            return array
        return _slice(array, self.part.head, array.shape[1] // self.part.heads, 1)


def _slice(array: Array, index: int | jax.Array, length: int, axis: int) -> Array:
    """The index-th piece of `length`; of a NumPy array a NumPy array, where the index is known."""
    if isinstance(index, jax.Array) or isinstance(array, jax.Array):
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), index * length, length, axis)
    return np.moveaxis(np.moveaxis(array, axis, 0)[index * length : (index + 1) * length], 0, axis)
