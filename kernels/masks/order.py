"""Masks of order and distance: causal, prefix, windows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from kernels.masks.base import LIMIT, Builder, Mask, check_counts, register
from kernels.masks.expression import EVERYTHING, Expr


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions", "kv_positions"],
    meta_fields=["offset"],
)
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query at position p sees keys at positions up to p + offset.

    Attributes:
      offset: 0 lets a query see its own key; -1 hides it.
      q_positions, kv_positions: int [B or 1, Q] and [B or 1, K]; None means slots.
    """

    offset: int = 0
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None

    def __post_init__(self):
        check_counts(self, 1 - LIMIT, offset=self.offset)

    def expression(self, build: Builder) -> Expr:
        return build.key(self.kv_positions) <= build.query(self.q_positions) + self.offset


@functools.partial(register, data_fields=["prefix", "q_positions", "kv_positions"])
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Slots of a prefix see each other both ways; alone it shows nothing else.

    A prefix language model (Raffel et al. 2020, section 3.2.1) is `Causal() | Prefix(flags)`.

    Attributes:
      prefix: flags [B, L], nonzero at prefix slots (queries and keys are the same row), or
        lengths [B]: the first `lengths[b]` positions are the prefix.
      q_positions, kv_positions: int [B or 1, Q] and [B or 1, K], used with lengths; None means
        slots.
    """

    prefix: jax.Array
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None

    def expression(self, build: Builder) -> Expr:
        if self.prefix.ndim == 2:
            q = kv = self.prefix != 0
        else:
            lengths = self.prefix[:, None]
            q = _positions(self.q_positions, build.q_len) < lengths
            kv = _positions(self.kv_positions, build.kv_len) < lengths
        return build.query(q).differs(0) & build.key(kv).differs(0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query at slot i sees slots i - left to i + right; None leaves that side open."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self):
        sides = {"left": self.left, "right": self.right}
        check_counts(self, **{name: side for name, side in sides.items() if side is not None})

    def expression(self, build: Builder) -> Expr:
        distance = build.key() - build.query()
        visible = EVERYTHING
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["left", "right", "dilation"],
)
@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A window with gaps: every `dilation`-th slot (Beltagy et al. 2020, section 3.1).

    A query at slot i sees i + s * dilation for s from -left to right.
    """

    left: int
    right: int
    dilation: int

    def __post_init__(self):
        check_counts(self, left=self.left, right=self.right)
        check_counts(self, 1, dilation=self.dilation)
        for name in ("left", "right"):
            if getattr(self, name) * self.dilation >= LIMIT:
                raise ValueError(
                    f"Dilated.{name} = {getattr(self, name)} times dilation = {self.dilation} "
                    f"must be below {LIMIT}"
                )

    def expression(self, build: Builder) -> Expr:
        distance = build.key() - build.query()
        window = SlidingWindow(self.left * self.dilation, self.right * self.dilation)
        return window.expression(build) & distance.multiple_of(self.dilation)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["sink", "window"])
@dataclasses.dataclass(frozen=True)
class AShape(Mask):
    """Causal, limited to the first keys and a window (StreamingLLM, Xiao et al. 2024, section 3).

    Attributes:
      sink: keys at the start of the row that every later query sees.
      window: keys before the query that it sees beside itself.
    """

    sink: int
    window: int

    def __post_init__(self):
        check_counts(self, sink=self.sink, window=self.window)

    def expression(self, build: Builder) -> Expr:
        near = SlidingWindow(left=self.window).expression(build)
        return Causal().expression(build) & (near | (build.key() < self.sink))


def _positions(positions: jax.Array | None, length: int) -> jax.Array | np.ndarray:
    return np.arange(length)[None] if positions is None else positions
