"""The base of all masks: what they share, and how they combine."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.masks.expression import EVERYTHING, Expr, evaluate

Array = np.ndarray | jax.Array
register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])

# Sums and differences of two such numbers are int32, as kernels compute them.
LIMIT = 2**30


def check_counts(mask: Mask, least: int = 0, **fields: int) -> None:
    """Of a mask's own fields, which a pytree keeps as they are whatever its leaves become.

    Raises:
      ValueError: a field is no whole number from `least` to below LIMIT.
    """
    for name, value in fields.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (whole and least <= value < LIMIT):
            raise ValueError(
                f"{type(mask).__name__}.{name} = {value!r} must be a whole number of at least "
                f"{least} and below {LIMIT}"
            )


@dataclasses.dataclass(frozen=True)
class Atom:
    """A pattern of whole blocks: bool [B or 1, H or 1, R, C] over blocks of these sizes."""

    pattern: Array
    block_q: int
    block_kv: int

    def per_slot(self, q_len: int, kv_len: int) -> Array:
        """The flag of each pair of slots: bool [B or 1, H or 1, Q, K]."""
        rows, cols = np.arange(q_len) // self.block_q, np.arange(kv_len) // self.block_kv
        return self.pattern[..., rows[:, None], cols[None, :]]


class Builder:
    """Collects the operands of an expression while masks write it down.

    Attributes:
      q_len, kv_len: slots of queries and keys.
      queries, keys: int32 [B or 1, H or 1, Q] and [B or 1, H or 1, K], one an operand.
      pairs: int8 [B or 1, H or 1, Q, K].
      atoms: patterns of blocks.
    """

    def __init__(self, q_len: int, kv_len: int):
        self.q_len, self.kv_len = q_len, kv_len
        self.queries: list[Array] = []
        self.keys: list[Array] = []
        self.pairs: list[Array] = []
        self.atoms: list[Atom] = []

    def query(self, values: Array | None = None) -> Expr:
        """The query's slot, or its value in [Q], [B or 1, Q] or [B or 1, H or 1, Q]."""
        if values is None:
            return Expr("query_slot")
        return Expr("query", (_add(self.queries, per_slot(values, self.q_len, "query")),))

    def key(self, values: Array | None = None) -> Expr:
        """The key's slot, or its value in [K], [B or 1, K] or [B or 1, H or 1, K]."""
        if values is None:
            return Expr("key_slot")
        return Expr("key", (_add(self.keys, per_slot(values, self.kv_len, "key")),))

    def pair(self, array: Array) -> Expr:
        """The pair's own flag in [B or 1, H or 1, Q, K]."""
        return Expr("pair", (_add(self.pairs, array.astype(np.int8)),)).differs(0)

    def blocks(self, pattern: Array, block_q: int, block_kv: int) -> Expr:
        """The flag of the pair's block in [B or 1, H or 1, R, C]."""
        self.atoms.append(Atom(pattern.astype(bool), block_q, block_kv))
        return Expr("atom", (len(self.atoms) - 1,)).differs(0)


class Mask:
    """Who sees whom: a frozen pytree that writes itself down as an expression."""

    def expression(self, build: Builder) -> Expr:
        """The mask over `build`'s slots; arrays it needs are handed to `build`."""
        raise NotImplementedError

    def row_bound(self, block_q: int, block_kv: int) -> float:
        """At most how many blocks of these sizes a row of blocks can see, as far as is known."""
        return math.inf

    def choices(self) -> tuple[tuple[Mask, ...], int | jax.Array]:
        """Masks that this one is surely one of, and which: what they show is known on the host
        where of this one it is not."""
        return (self,), 0

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        """The mask as an array: bool [B or 1, H or 1, Q, K], True where the query sees the key."""
        build = Builder(q_len, kv_len)
        expr = self.expression(build)

        def leaf(op: str, index: int | None = None) -> Array:
            if op == "query_slot":
                return np.arange(q_len, dtype=np.int32)[None, None, :, None]
            if op == "key_slot":
                return np.arange(kv_len, dtype=np.int32)[None, None, None, :]
            if op == "query":
                return build.queries[index][..., :, None]
            if op == "key":
                return build.keys[index][..., None, :]
            if op == "pair":
                return build.pairs[index]
            return build.atoms[index].per_slot(q_len, kv_len).astype(np.int32)

        visible = jnp.asarray(evaluate(expr, leaf))
        lead = (1, 1) if visible.ndim < 4 else visible.shape[:2]
        return jnp.broadcast_to(visible, (*lead, q_len, kv_len))

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

    def expression(self, build: Builder) -> Expr:
        return self.left.expression(build) & self.right.expression(build)

    def row_bound(self, block_q: int, block_kv: int) -> float:
        return min(mask.row_bound(block_q, block_kv) for mask in (self.left, self.right))


@functools.partial(register, data_fields=["left", "right"])
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Visible in either mask."""

    left: Mask
    right: Mask

    def expression(self, build: Builder) -> Expr:
        return self.left.expression(build) | self.right.expression(build)

    def row_bound(self, block_q: int, block_kv: int) -> float:
        return sum(mask.row_bound(block_q, block_kv) for mask in (self.left, self.right))


@functools.partial(register, data_fields=["mask"])
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Visible where the other mask hides."""

    mask: Mask

    def expression(self, build: Builder) -> Expr:
        return ~self.mask.expression(build)


@functools.partial(register, data_fields=[])
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def expression(self, build: Builder) -> Expr:
        return EVERYTHING


@functools.partial(register, data_fields=["mask", "slots"])
@dataclasses.dataclass(frozen=True)
class Rows(Mask):
    """Some rows of a mask over all slots, as a decoding step's few queries need.

    Attributes:
      mask: over as many queries as there are keys.
      slots: int [B, Q]: the query at i is the mask's query slots[b, i].
    """

    mask: Mask
    slots: Array

    def expression(self, build: Builder) -> Expr:
        return self.mask.expression(_RowsBuilder(build, self.slots))


class _RowsBuilder(Builder):
    """Hands operands over with their rows picked."""

    def __init__(self, build: Builder, slots: Array):
        super().__init__(build.kv_len, build.kv_len)
        self.build, self.slots = build, slots

    def query(self, values: Array | None = None) -> Expr:
        if values is None:
            return self.build.query(self.slots)
        values = per_slot(values, self.q_len, "query")
        return self.build.query(jnp.take_along_axis(values, self.slots[:, None], -1, mode="clip"))

    def key(self, values: Array | None = None) -> Expr:
        return self.build.key(values)

    def pair(self, array: Array) -> Expr:
        return self.build.pair(_rows_of(array, self.slots))

    def blocks(self, pattern: Array, block_q: int, block_kv: int) -> Expr:
        rows = _rows_of(pattern, self.slots // block_q)
        return self.build.pair(rows[..., np.arange(self.kv_len) // block_kv])


def _rows_of(array: Array, slots: Array) -> jax.Array:
    """[B or 1, H or 1, L, K] at slots [B, Q] -> [B, H or 1, Q, K]."""
    return jnp.take_along_axis(jnp.asarray(array), slots[:, None, :, None], 2, mode="clip")


def per_slot(values: Array, length: int, axis: str) -> Array:
    """values as int32 [B or 1, H or 1, length]."""
    if values.shape[-1] != length:
        raise ValueError(f"a mask has values for {values.shape[-1]} {axis} slots, not {length}")
    values = values if values.dtype == np.int32 else values.astype(np.int32)
    if values.ndim == 1:
        return values[None, None]
    return values[:, None] if values.ndim == 2 else values


def _add(operands: list[Array], values: Array) -> int:
    operands.append(values)
    return len(operands) - 1
