"""What a mask says, as an expression over slots that can be evaluated in any domain.

An expression is a hashable tree. Its leaves are the slots of query and key, per-slot operands
(segment ids, positions, flags), whole arrays, and block-level atoms; its inner nodes are sums,
comparisons and the connectives. Leaves may stand for whole axes (`Mask.dense`), for one tile
inside a kernel, or for the `Range` of values in a block, where a comparison becomes a `Truth`:
whether any pair of the block may see, and whether all surely do. One definition of a mask thus
gives its array, its kernel and its list of active blocks, and they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEAVES = ("query_slot", "key_slot", "query", "key", "pair", "atom")


@dataclasses.dataclass(frozen=True)
class Expr:
    """A node: its operation and its arguments (nodes, or integers known at once).

    `equals` and `differs` stand for == and !=, which compare the trees themselves.
    """

    op: str
    args: tuple[Any, ...] = ()

    def __add__(self, other: Expr | int) -> Expr:
        return Expr("add", (self, other))

    def __sub__(self, other: Expr | int) -> Expr:
        return Expr("sub", (self, other))

    def __le__(self, other: Expr | int) -> Expr:
        return Expr("le", (self, other))

    def __lt__(self, other: Expr | int) -> Expr:
        return Expr("lt", (self, other))

    def __ge__(self, other: Expr | int) -> Expr:
        return Expr("ge", (self, other))

    def __gt__(self, other: Expr | int) -> Expr:
        return Expr("gt", (self, other))

    def equals(self, other: Expr | int) -> Expr:
        return Expr("equals", (self, other))

    def differs(self, other: Expr | int) -> Expr:
        return ~self.equals(other)

    def multiple_of(self, divisor: int) -> Expr:
        return Expr("multiple_of", (self, divisor))

    def __and__(self, other: Expr) -> Expr:
        return Expr("and", (self, other))

    def __or__(self, other: Expr) -> Expr:
        return Expr("or", (self, other))

    def __invert__(self) -> Expr:
        return Expr("not", (self,))


EVERYTHING = Expr("constant", (True,))


def evaluate(expr: Expr, leaf: Callable[..., Any]) -> Any:
    """The value of an expression where `leaf(op, *args)` gives the values of its leaves."""
    if expr.op == "constant":
        return np.bool_(expr.args[0])
    if expr.op in LEAVES:
        return leaf(expr.op, *expr.args)
    values = (evaluate(arg, leaf) if isinstance(arg, Expr) else arg for arg in expr.args)
    return _OPERATIONS[expr.op](*values)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of the pairs of a block: bool arrays of one shape.

    Attributes:
      any: False where surely no pair sees.
      all: True where surely every pair sees.
    """

    any: Any
    all: Any
    __array_ufunc__ = None  # NumPy's operators leave `array & truth` to us

    def __and__(self, other: Truth) -> Truth:
        other = _truth(other)
        return Truth(self.any & other.any, self.all & other.all)

    def __or__(self, other: Truth) -> Truth:
        other = _truth(other)
        return Truth(self.any | other.any, self.all | other.all)

    def __rand__(self, other: Any) -> Truth:
        return self & other

    def __ror__(self, other: Any) -> Truth:
        return self | other

    def __invert__(self) -> Truth:
        return Truth(~self.all, ~self.any)


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """The integers that a block's values lie among: arrays lo <= hi, both included."""

    lo: Any
    hi: Any
    __array_ufunc__ = None

    def __add__(self, other: Range | int) -> Range:
        other = _range(other)
        return Range(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Range | int) -> Range:
        other = _range(other)
        return Range(self.lo - other.hi, self.hi - other.lo)

    def __le__(self, other: Range | int) -> Truth:
        other = _range(other)
        return Truth(self.lo <= other.hi, self.hi <= other.lo)

    def __lt__(self, other: Range | int) -> Truth:
        return self + 1 <= other

    def __ge__(self, other: Range | int) -> Truth:
        return _range(other) <= self

    def __gt__(self, other: Range | int) -> Truth:
        return _range(other) < self

    def __eq__(self, other: Range | int) -> Truth:  # type: ignore[override]
        other = _range(other)
        overlap = (self.lo <= other.hi) & (self.hi >= other.lo)
        return Truth(overlap, (self.lo == other.hi) & (self.hi == other.lo))

    def multiple_of(self, divisor: int) -> Truth:
        last = self.hi // divisor * divisor  # the last multiple up to hi
        return Truth(last >= self.lo, (self.lo == self.hi) & (last == self.hi))


ANYTHING = Range(np.int64(-(2**40)), np.int64(2**40))


def _range(value: Range | int) -> Range:
    return value if isinstance(value, Range) else Range(value, value)


def _truth(value: Any) -> Truth:
    return value if isinstance(value, Truth) else Truth(value, value)


def _multiple_of(value: Any, divisor: int) -> Any:
    if isinstance(value, Range):
        return value.multiple_of(divisor)
    value = jnp.asarray(value)
    return jax.lax.rem(value, jax.lax.full_like(value, divisor)) == 0


_OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "equals": operator.eq,
    "multiple_of": _multiple_of,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.invert,
}
