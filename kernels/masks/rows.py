"""Masks that come with the batch: segments, global tokens, any array."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from kernels.masks.base import Builder, Mask, check_counts, register
from kernels.masks.expression import EVERYTHING, Expr


@functools.partial(register, data_fields=["q_ids", "kv_ids"])
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """A query sees the keys of its own segment; id 0 is padding, which neither sees nor is seen.

    Attributes:
      q_ids: int [B, Q].
      kv_ids: int [B, K].
    """

    q_ids: jax.Array
    kv_ids: jax.Array

    def expression(self, build: Builder) -> Expr:
        query = build.query(self.q_ids)
        return query.equals(build.key(self.kv_ids)) & query.differs(0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["flags"],
    meta_fields=["count", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class GlobalTokens(Mask):
    """Tokens that see all and that all see (Beltagy et al. 2020, section 3.1); no one else does.

    Attributes:
      count: the first `count` slots are global.
      flags: [B or 1, L], nonzero at global slots, instead of `count`; queries and keys are then
        the same row.
      rows: global queries see every key.
      columns: every query sees global keys.
    """

    count: int = 0
    flags: jax.Array | None = None
    rows: bool = True
    columns: bool = True

    def __post_init__(self):
        check_counts(self, count=self.count)
        if self.count and self.flags is not None:
            raise ValueError(
                f"GlobalTokens.count = {self.count} beside flags: give count = 0 or no flags"
            )

    def expression(self, build: Builder) -> Expr:
        visible = ~EVERYTHING
        if self.rows:
            visible |= self._chosen(build.query)
        if self.columns:
            visible |= self._chosen(build.key)
        return visible

    def _chosen(self, axis: Callable[..., Expr]) -> Expr:
        return axis() < self.count if self.flags is None else axis(self.flags != 0).differs(0)


@functools.partial(register, data_fields=["array"])
@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """Any mask, written out.

    Attributes:
      array: bool [Q, K], [B or 1, Q or 1, K] or [B or 1, H or 1, Q or 1, K]. A query axis of 1
        serves every query, and costs no more than a flag a key.
    """

    array: jax.Array

    def expression(self, build: Builder) -> Expr:
        if not 2 <= self.array.ndim <= 4:
            raise ValueError(
                f"a Dense mask is {list(self.array.shape)}; give [Q, K], [B or 1, Q or 1, K] or "
                f"[B or 1, H or 1, Q or 1, K]"
            )
        array = self.array if self.array.ndim > 2 else self.array[None]
        array = array if array.ndim == 4 else array[:, None]
        if array.shape[2] == 1:
            return build.key(array[:, :, 0] != 0).differs(0)
        if array.shape[2:] != (build.q_len, build.kv_len):
            raise ValueError(
                f"a Dense mask is {array.shape[2]} by {array.shape[3]} for {build.q_len} queries "
                f"and {build.kv_len} keys"
            )
        return build.pair(array != 0)
