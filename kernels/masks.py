"""Masks: a symbolic description of who sees whom, combined with `&`, `|` and `~`.

A mask is a frozen pytree. It says nothing of how it is computed: a backend may ask for the whole
boolean array (`dense`), or recognise the parts and skip what no query sees. True means that the
query sees the key.

Slots and positions: a slot is an index into the row of keys or queries as laid out in memory.
Masks speak of slots, 0..Q-1 and 0..K-1, unless they are given explicit positions, which is how a
decoding step says that its few queries stand at later slots of the cache.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


class Mask:
    """Base of all masks."""

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        """The mask as an array: bool [B or 1, Q, K], True where the query sees the key."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


@functools.partial(register, data_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Visible in both masks."""

    left: Mask
    right: Mask

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        return self.left.dense(q_len, kv_len) & self.right.dense(q_len, kv_len)


@functools.partial(register, data_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Visible in either mask."""

    left: Mask
    right: Mask

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        return self.left.dense(q_len, kv_len) | self.right.dense(q_len, kv_len)


@functools.partial(register, data_fields=["mask"])
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Visible where the other mask hides."""

    mask: Mask

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        return ~self.mask.dense(q_len, kv_len)


@functools.partial(register, data_fields=[])
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        return jnp.ones((1, q_len, kv_len), bool)


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

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        q, kv = _positions(self.q_positions, q_len), _positions(self.kv_positions, kv_len)
        return kv[:, None, :] <= q[:, :, None] + self.offset


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

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        if self.prefix.ndim == 2:
            q = kv = self.prefix != 0
        else:
            lengths = self.prefix[:, None]
            q = _positions(self.q_positions, q_len) < lengths
            kv = _positions(self.kv_positions, kv_len) < lengths
        return q[:, :, None] & kv[:, None, :]


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

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        q, kv = self.q_ids[:, :, None], self.kv_ids[:, None, :]
        return (q == kv) & (q != 0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query at slot i sees slots i - left to i + right; None leaves that side open."""

    left: int | None = None
    right: int | None = None

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        distance = jnp.arange(kv_len)[None, None, :] - jnp.arange(q_len)[None, :, None]
        visible = jnp.ones_like(distance, bool)
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible


@functools.partial(register, data_fields=["array"])
@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """Any mask, written out.

    Attributes:
      array: bool [Q, K] or [B or 1, Q or 1, K]. A query axis of 1 serves every query.
    """

    array: jax.Array

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        array = self.array if self.array.ndim == 3 else self.array[None]
        return jnp.broadcast_to(array.astype(bool), (array.shape[0], q_len, kv_len))


def _positions(positions: jax.Array | None, length: int) -> jax.Array:
    return jnp.arange(length)[None] if positions is None else positions
