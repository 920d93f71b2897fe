"""The walk over active blocks that forward and backward share.

A step takes a strip, the next few active blocks of one row of blocks, for a few batch rows and
heads at once. Wide rows are several strips, so that no row pays for the widest, and lists that are
known at run time only cost what they hold. All shapes below are of one step: b batch rows, h query
heads, n kv heads, and w keys, those of the strip's blocks one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bias import Distances, Lowered
from kernels.block_sparse_attention.problem import ACTIVE, FIRST, PARTIAL, Problem
from kernels.block_sparse_attention.xla.windows import added, joined, start_of, tile, window

# Logits of a step. Fewer than the first do not pay for the step's fixed cost, so that a strip is
# then several blocks, up to so many keys; more than the second leave a core's cache. Of a strip of
# several blocks more is padding, and its gradient leaves the cache sooner: a block a step is best
# where heads are enough. Measured on a CPU at head dim 64.
FEW_LOGITS, MANY_LOGITS = 1 << 14, 1 << 17
STRIP_KEYS = 256
# Of a bias written out for some heads (logits.Spread), if one head's are not more.
SPREAD_VALUES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Strip:
    """One step's place; scalars are traced.

    Attributes:
      batch, head, kv_head: the first of each.
      row: of blocks.
      is_first: of its row.
      cols: of blocks, one after another.
      flags: int32 [len(cols)], 0 where the row has no further block.
    """

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    row: jax.Array
    is_first: jax.Array
    cols: tuple[jax.Array, ...]
    flags: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a problem is cut into steps: so many batch rows, heads, kv heads and blocks each."""

    problem: Problem
    batch: int
    heads: int
    kv_heads: int
    blocks: int
    total_batch: int
    total_heads: int
    group: int

    @staticmethod
    def of(problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array) -> Walk:
        lists = problem.by_row
        block = problem.block_q * problem.block_kv
        group = q.shape[1] // k.shape[1]
        own_batch, own_heads = (n > 1 for n in lists.rows.shape[:2])
        limit = MANY_LOGITS // block
        if isinstance(bias, Distances):
            limit = min(limit, SPREAD_VALUES // (problem.block_q * bias.values.shape[1]))
        heads = 1 if own_heads else _divisor(q.shape[1], limit, group)
        batch = 1 if own_batch else _divisor(q.shape[0], MANY_LOGITS // (block * heads), 1)
        widest = np.diff(lists.offsets).max() if problem.is_static else lists.rows.shape[-1]
        several = min(
            FEW_LOGITS // (block * heads * batch), STRIP_KEYS // problem.block_kv, int(widest)
        )
        kv_heads = max(1, heads // group)
        return Walk(problem, batch, heads, kv_heads, max(1, several), *q.shape[:2], group)

    def heads_in_turn(self, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """body(first head, state) for all heads."""
        return _in_turn(self.total_heads, self.heads, body, state)

    def strips(self, head: jax.Array, step: Callable[[Strip, Any], Any], state: Any) -> Any:
        """step(strip, state) for all strips of these heads, over the batch."""
        lists = self.problem.by_row
        arrays = [jnp.asarray(x) for x in (lists.rows, lists.cols, lists.flags, lists.offsets)]

        def of_batch(batch: jax.Array, state: Any) -> Any:
            own = [_at(_at(x, batch), head) for x in arrays]
            rows, cols, flags, offsets = own

            def next_strip(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
                start, state = carry
                row = rows[start]
                end = offsets[row + 1]
                entries = start + np.arange(self.blocks, dtype=np.int32)
                is_entry = entries < end
                # Beyond the row's last block its first is visited again, in vain: that one is
                # read anyway. A row without any has nothing that may be read but the zeros
                # behind the last column.
                entries = jnp.where(is_entry, entries, start)
                active = (flags[entries] & ACTIVE) > 0
                places = jnp.where(active, cols[entries], self._nothing)
                strip = Strip(
                    batch,
                    head,
                    head // self.group,
                    row,
                    flags[start] & FIRST > 0,
                    tuple(places[i] for i in range(self.blocks)),
                    jnp.where(is_entry, flags[entries], 0),
                )
                return jnp.minimum(start + self.blocks, end), step(strip, state)

            carry = offsets[0], state
            return jax.lax.while_loop(lambda carry: carry[0] < offsets[-1], next_strip, carry)[1]

        return _in_turn(self.total_batch, self.batch, of_batch, state)

    def queries(self, x: jax.Array, strip: Strip) -> jax.Array:
        """The strip's rows of x [B, H, Q, ..]: [b, h, block_q, ..]."""
        size = self.problem.block_q
        start = strip.batch, strip.head, strip.row * size
        return window(x, start, (self.batch, self.heads, size))

    def keys(self, x: jax.Array, strip: Strip) -> jax.Array:
        """The strip's keys of x [B, N, K, ..]: [b, n, w, ..]."""
        size = self.problem.block_kv
        return joined(
            [
                window(
                    x,
                    (strip.batch, strip.kv_head, col * size),
                    (self.batch, self.kv_heads, size),
                )
                for col in strip.cols
            ],
            2,
        )

    def put_queries(self, x: jax.Array, strip: Strip, new: jax.Array) -> jax.Array:
        start = strip.batch, strip.head, strip.row * self.problem.block_q
        return jax.lax.dynamic_update_slice(x, new, start_of(x, start))

    def add_keys(self, x: jax.Array, strip: Strip, more: jax.Array) -> jax.Array:
        """x [B, N, Dh, K] plus more [b, n, Dh, w]."""
        size = self.problem.block_kv
        for i, col in enumerate(strip.cols):
            start = strip.batch, strip.kv_head, 0, col * size
            x = added(x, start, more[..., i * size : (i + 1) * size])
        return x

    def by_kv_head(self, x: jax.Array) -> jax.Array:
        """[b, h, block_q, ..] as [b, n, h / n * block_q, ..]: query heads that share a kv head
        are further rows of it, so that keys and values are never repeated."""
        return x.reshape(x.shape[0], self.kv_heads, -1, *x.shape[3:])

    def by_head(self, x: jax.Array) -> jax.Array:
        """The inverse of by_kv_head."""
        return x.reshape(x.shape[0], self.heads, -1, *x.shape[3:])

    def padded(self, x: jax.Array) -> jax.Array:
        """x [B, N, K, ..] and the zeros that a row without active blocks reads instead."""
        if not self._reads_nothing:
            return x
        return jnp.pad(x, [(0, 0), (0, 0), (0, self.problem.block_kv)] + [(0, 0)] * (x.ndim - 3))

    @property
    def _nothing(self) -> int:
        return self.problem.kv_len // self.problem.block_kv

    @property
    def _reads_nothing(self) -> bool:
        return bool(np.any(self._listed() & ACTIVE == 0)) if self.problem.is_static else True

    @property
    def _sees_everything(self) -> bool:
        """No strip hides anything: neither a part of a block nor the end of a row."""
        if not self.problem.is_static:
            return False
        widths = np.diff(self.problem.by_row.offsets)
        full = np.all(self._listed() & (ACTIVE | PARTIAL) == ACTIVE)
        return bool(full and np.all(widths % self.blocks == 0))

    def _listed(self) -> np.ndarray:
        """Flags of the entries of all groups."""
        lists = self.problem.by_row
        return lists.flags[np.arange(lists.flags.shape[-1]) < lists.offsets[..., -1:]]

    def visible(self, strip: Strip) -> jax.Array | None:
        """Who sees whom: bool [b or 1, h or 1, block_q, w]; None for everyone."""
        problem = self.problem
        if self._sees_everything:
            return None
        block_q, block_kv = problem.block_q, problem.block_kv
        q_slot = strip.row * block_q + np.arange(block_q, dtype=np.int32)
        kv_slot = joined([c * block_kv + np.arange(block_kv, dtype=np.int32) for c in strip.cols])
        flags = jnp.repeat(strip.flags, block_kv)
        query = [self.queries(jnp.asarray(x), strip)[..., None] for x in problem.query]
        key = [self._mask_keys(x, strip)[..., None, :] for x in problem.key]
        pair = [self.pairs(jnp.asarray(x), strip) for x in problem.pair]
        seen = tile(problem, q_slot, kv_slot, query, key, pair, flags[None])
        is_active, is_full = flags & ACTIVE > 0, flags & PARTIAL == 0
        return is_active & (is_full | seen)

    def _mask_keys(self, x: np.ndarray | jax.Array, strip: Strip) -> jax.Array:
        """The strip's keys of a mask's operand [B or 1, H or 1, K], which goes by query head."""
        size = self.problem.block_kv
        sizes = self.batch, self.heads, size
        starts = [(strip.batch, strip.head, col * size) for col in strip.cols]
        return joined([window(jnp.asarray(x), start, sizes) for start in starts], 2)

    def pairs(self, x: jax.Array, strip: Strip) -> jax.Array:
        """The strip's part of x [B or 1, H or 1, Q or 1, K]: [.., block_q or 1, w]."""
        sizes = self.batch, self.heads, self.problem.block_q, self.problem.block_kv
        return joined([window(x, start, sizes) for start in self._pair_starts(strip)], 3)

    def add_pairs(self, x: jax.Array, strip: Strip, more: jax.Array) -> jax.Array:
        """x [B or 1, H or 1, Q or 1, K] plus more [b, h, block_q, w], summed where x has 1."""
        size = self.problem.block_kv
        over = [axis for axis in range(3) if x.shape[axis] == 1 and more.shape[axis] > 1]
        more = more.sum(over, keepdims=True) if over else more
        for i, start in enumerate(self._pair_starts(strip)):
            x = added(x, start, more[..., i * size : (i + 1) * size])
        return x

    def _pair_starts(self, strip: Strip) -> list[tuple[jax.Array, ...]]:
        block_q, block_kv = self.problem.block_q, self.problem.block_kv
        corner = strip.batch, strip.head, strip.row * block_q
        return [(*corner, col * block_kv) for col in strip.cols]


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return x[0] if x.shape[0] == 1 else x[index]


def _in_turn(total: int, step: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    if total == step:
        return body(jnp.int32(0), state)
    return jax.lax.fori_loop(
        np.int32(0), np.int32(total // step), lambda i, state: body(i * step, state), state
    )


def _divisor(total: int, limit: int, group: int) -> int:
    """The largest divisor of total up to limit that holds whole groups or divides one."""
    fits = [
        d
        for d in range(1, total + 1)
        if total % d == 0 and d <= max(limit, 1) and (d % group == 0 or group % d == 0)
    ]
    return fits[-1]
