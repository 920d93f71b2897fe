"""T5's relative position bias inside the kernels: a vector a block, spread over its diagonals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import bias as kinds
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.tpu.steps import Operand, Output, Place, Steps


@dataclasses.dataclass(frozen=True)
class OfDistance:
    """A value a distance of slots: a window of bq + bk values a block, spread over its diagonals.

    Windows are cut beforehand, one for each offset that blocks can have to each other; they
    overlap, so that they hold (bq + bk) / gcd(bq, bk) times Q + K values: nothing of size Q * K.
    Within a window distances fall, for tile[x, y] then is window[bk - 1 - x + y].
    """

    problem: Problem
    bias: kinds.Distances
    factor: float
    is_resident = True

    @property
    def _unit(self) -> int:
        return math.gcd(self.problem.block_q, self.problem.block_kv)

    @property
    def _width(self) -> int:
        return self.problem.block_q + self.problem.block_kv

    @property
    def _offsets(self) -> int:
        return (self.problem.q_len + self.problem.kv_len - self._width) // self._unit + 1

    def _offset(self, place: Place) -> Any:
        last = self.problem.kv_len // self.problem.block_kv - 1
        down, across = self.problem.block_q // self._unit, self.problem.block_kv // self._unit
        return place.row * down + (last - place.col) * across

    def operands(self, steps: Steps) -> tuple[Operand, ...]:
        values = self.bias.values.astype(jnp.float32) * self.factor
        heads = values.shape[0]
        units = values[:, ::-1].reshape(heads, -1, self._unit)
        parts = [units[:, i : i + self._offsets] for i in range(self._width // self._unit)]
        windows = jnp.stack(parts, 2).reshape(heads, self._offsets, 1, self._width)
        block = (None, None, 1, self._width)
        spec = steps.spec(block, lambda at: (at.lead((1, heads)), self._offset(at), 0, 0))
        return ((windows, spec),)

    def added(self, logits: jax.Array, refs: Any, keys: slice) -> jax.Array:
        size, length = logits.shape
        first = self.problem.block_kv - keys.stop
        window = refs[0][:, first : first + size + length]
        return logits + spread(window, size, length)

    def gradient(self, steps: Steps) -> Output:
        shape = (steps.batch * steps.heads, self._offsets, self._width)
        spec = steps.spec((None, *shape[1:]), lambda at: (at.head, 0, 0))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def accumulate(
        self, ref: Any, place: Place, refs: Any, ds: jax.Array, keys: slice, before: Any
    ) -> None:
        first = self.problem.block_kv - keys.stop
        lanes = slice(first, first + sum(ds.shape))
        ref[pl.ds(self._offset(place), 1), lanes] += gathered(ds)

    def finish(self, total: jax.Array, heads: int) -> kinds.Distances:
        unit = self._unit
        parts = total.reshape(-1, heads, self._offsets, self._width // unit, unit).sum(0)
        count = parts.shape[2]
        units = sum(
            jnp.pad(parts[:, :, i], ((0, 0), (i, count - 1 - i), (0, 0))) for i in range(count)
        )
        return kinds.Distances(units.reshape(heads, -1)[:, ::-1])


def spread(window: jax.Array, size: int, length: int) -> jax.Array:
    """tile [size, length] with tile[x, y] = window[size - 1 - x + y]; window [1, size + length].

    Rows double: those above are those below, rolled by their number. Rolls by whole vector
    registers cost nothing, so that most of the tile costs no roll at all.
    """
    tile, width = window, window.shape[1]
    while tile.shape[0] < size:
        tile = jnp.concatenate([pltpu.roll(tile, width - tile.shape[0], 1), tile])
    return tile[tile.shape[0] - size :, :length]


def gathered(tile: jax.Array) -> jax.Array:
    """The transpose of `spread`: sums over diagonals, [1, size + length]."""
    size, length = tile.shape
    rows = 1 << (size - 1).bit_length()
    tile = jnp.concatenate([tile, jnp.zeros((size, size), tile.dtype)], 1)
    if rows > size:
        tile = jnp.concatenate([jnp.zeros((rows - size, size + length), tile.dtype), tile])
    while rows > 1:
        rows //= 2
        tile = pltpu.roll(tile[:rows], rows, 1) + tile[rows:]
    return tile
