"""Tiles in a warpgroup's registers: products, masks, and the units of the softmax.

The interpreter of Pallas runs the warpgroups as threads and knows TMA copies and barriers, but
no layouts of registers, and no wgmma of transposed tiles or onto registers: `Registers` stands in
for those alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention.problem import PARTIAL, Problem
from kernels.block_sparse_attention.softmax import LOG2_E, scale_is_fused, tanh

WARPGROUP_ROWS = 64  # rows of a wgmma
HIDDEN = -math.inf
TILE, ROW, COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


@dataclasses.dataclass(frozen=True)
class Registers:
    """Tiles in a warpgroup's registers, spread over its threads as wgmma wants them."""

    interpret: bool

    def _laid(self, value: jax.Array, layout: Any) -> jax.Array:
        return value if self.interpret else plgpu.layout_cast(value, layout)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """float32, a tile or (for one axis) a value for each of its rows."""
        return self._laid(jnp.full(shape, value, jnp.float32), TILE if len(shape) == 2 else ROW)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        return self._laid(lax.broadcasted_iota(jnp.int32, shape, axis), TILE)

    def load(self, ref: Any, axis: int) -> jax.Array:
        """A vector in shared memory that runs along `axis` of tiles."""
        layout = ROW if axis == 0 else COLUMN
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=layout)

    def spread(self, vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        return lax.broadcast_in_dim(vector, shape, [axis])

    def products(
        self, *pairs: tuple[Any, Any], during: Callable[[], None] | None = None
    ) -> list[jax.Array]:
        """a @ b^T of pairs in shared memory, float32, computed by one batch of instructions.

        Args:
          during: is called while the tensor core works.
        """
        if self.interpret:
            if during is not None:
                during()
            return [jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32) for a, b in pairs]

        def batch(*accumulators: Any) -> list[jax.Array]:
            for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
            if during is not None:
                during()
            return [accumulator[...] for accumulator in accumulators]

        shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
        return pl.run_scoped(batch, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def accumulate(
        self,
        total: jax.Array,
        a: jax.Array,
        b: Any,
        *pairs: tuple[Any, Any],
        during: Callable[[], None] | None = None,
    ) -> list[jax.Array]:
        """[total + a @ b, *products(*pairs)] with a in registers and the rest in shared memory."""
        if self.interpret:
            total += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            return [total, *self.products(*pairs, during=during)]

        def batch(accumulators: Sequence[Any]) -> None:
            plgpu.wgmma(accumulators[0], a, b)
            for accumulator, (left, right) in zip(accumulators[1:], pairs, strict=True):
                plgpu.wgmma(accumulator, left, plgpu.transpose_ref(right, (1, 0)))
            if during is not None:
                during()

        zeros = [self.full((left.shape[0], right.shape[0]), 0) for left, right in pairs]
        return pl.run_state(batch)([plgpu.ACC.init(x) for x in (total, *zeros)])


@dataclasses.dataclass(frozen=True)
class Units:
    """Logits as base-2 exponents: `logits(products) * factor`.

    The factor is kept apart where it can be fused with the subtraction of the maximum.
    """

    scale: float
    soft_cap: float | None

    @property
    def factor(self) -> float:
        fused = scale_is_fused(self.scale, self.soft_cap)
        return self.scale * LOG2_E if fused else 1.0

    def logits(self, products: jax.Array) -> jax.Array:
        if self.soft_cap is not None:
            return tanh(products, self.scale / self.soft_cap) * (self.soft_cap * LOG2_E)
        return products if self.factor != 1.0 else products * (self.scale * LOG2_E)

    def slope(self, logits: jax.Array) -> jax.Array | None:
        """The soft cap's derivative, given what `logits` returned; None where there is no cap."""
        if self.soft_cap is None:
            return None
        share = logits * (1 / (self.soft_cap * LOG2_E))
        return 1 - share * share


def hide(
    problem: Problem,
    registers: Registers,
    values: jax.Array,
    flags: jax.Array,
    q_start: jax.Array,
    kv_start: jax.Array,
    query: Sequence[Any],
    key: Sequence[Any],
    q_axis: int,
) -> jax.Array:
    """`values` [tile] with HIDDEN where the query does not see the key.

    Args:
      flags: of the tile's entry; tiles that are not PARTIAL pass untouched.
      q_start, kv_start: the tile's first slots.
      query, key: the mask's operands in shared memory, vectors of this tile.
      q_axis: the axis of `values` that is the queries'.
    """

    def partial(values: jax.Array) -> jax.Array:
        def along(axis: int, ref: Any) -> jax.Array:
            return registers.spread(registers.load(ref, axis), values.shape, axis)

        visible = problem.tile(
            registers.iota(values.shape, q_axis) + q_start,
            registers.iota(values.shape, 1 - q_axis) + kv_start,
            [along(q_axis, ref) for ref in query],
            [along(1 - q_axis, ref) for ref in key],
            flags=flags,
        )
        return jnp.where(visible, values, HIDDEN)

    if problem.expression.op == "constant":
        return values
    return lax.cond((flags & PARTIAL) != 0, partial, lambda values: values, values)
