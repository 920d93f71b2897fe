"""What a backend is given beside queries, keys and values: the active blocks of a mask."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.masks.expression import Expr, evaluate

# Bits of `Blocks.flags`. Bit 4 + k is the value of the mask's k-th block-level atom in the block.
FIRST, LAST, ACTIVE, PARTIAL = 1, 2, 4, 8
ATOM_BIT = 4
MAX_ATOMS = 4

Array = np.ndarray | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "cols", "flags", "offsets"],
    meta_fields=["is_static"],
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Active blocks as a flat list, line by line, so that cost follows their number alone.

    A line is a row of blocks (queries) or a column (keys), whichever the list is sorted by. A line
    without an active block has one entry, marked FIRST and LAST but not ACTIVE: from it nothing
    is computed, but its zeros get written. Entries beyond a group's count have flags 0 and repeat
    the last place.

    Attributes:
      rows, cols: int32 [Gb, Gh, S], the block's place; Gb is 1 or B, Gh is 1 or H.
      flags: int32 [Gb, Gh, S]: FIRST and LAST of its line, ACTIVE if any pair may be visible,
        PARTIAL unless surely every pair is.
      offsets: int32 [Gb, Gh, lines + 1]: line i's entries are offsets[i] to offsets[i + 1].
      is_static: the arrays are NumPy's and S is the largest count.
    """

    rows: Array
    cols: Array
    flags: Array
    offsets: Array
    is_static: bool

    @property
    def num_steps(self) -> int | jax.Array:
        """Entries of the longest group: S, or a traced int32 scalar where lists are dynamic."""
        return self.rows.shape[-1] if self.is_static else self.offsets[..., -1].max()

    @property
    def num_lines(self) -> int:
        return self.offsets.shape[-1] - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["by_row", "by_col", "query", "key", "pair"],
    meta_fields=["expression", "q_len", "kv_len", "block_q", "block_kv", "scale", "soft_cap"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention to be computed by blocks; lengths are multiples of the blocks.

    Attributes:
      by_row, by_col: the active blocks, sorted by (row, column) and by (column, row).
      query: the mask's operands for queries, int32 [Gb, Gh, Q] each.
      key: its operands for keys, int32 [Gb, Gh, K] each.
      pair: its whole arrays, int8 [Gb, Gh, Q, K] each.
      expression: the mask over slots and these operands.
      q_len, kv_len: Q and K, padding included.
      block_q, block_kv: slots of a block.
      scale, soft_cap: see kernels.attention.
    """

    by_row: Blocks
    by_col: Blocks
    query: tuple[Array, ...]
    key: tuple[Array, ...]
    pair: tuple[Array, ...]
    expression: Expr
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    scale: float
    soft_cap: float | None

    @property
    def is_static(self) -> bool:
        """The lists of blocks are known while tracing."""
        return self.by_row.is_static

    def tile(
        self,
        q_slot: jax.Array,
        kv_slot: jax.Array,
        query: Sequence[jax.Array] = (),
        key: Sequence[jax.Array] = (),
        pair: Sequence[jax.Array] = (),
        flags: jax.Array | int = 0,
    ) -> jax.Array:
        """Who sees whom in one tile: bool, of the shape that q_slot and kv_slot broadcast to.

        Args:
          q_slot, kv_slot: int32, [bq, 1] and [1, bk], or [1, bq] and [bk, 1] for a transposed
            tile, or further leading axes.
          query, key, pair: the operands' values in this tile, shaped to broadcast likewise.
          flags: int32, of the tile's entry in the list.
        """
        shape = jnp.broadcast_shapes(q_slot.shape, kv_slot.shape)
        values = {"query": query, "key": key, "pair": pair}

        def leaf(op: str, index: int | None = None) -> jax.Array:
            if op == "query_slot":
                value = q_slot
            elif op == "key_slot":
                value = kv_slot
            elif op == "atom":
                value = (flags >> (ATOM_BIT + index)) & 1
            else:
                value = values[op][index].astype(jnp.int32)
            # Whole tiles of int32: kernels' compilers broadcast these, but not all of them bools.
            return jnp.broadcast_to(value, shape)

        visible = evaluate(self.expression, leaf)
        return jnp.full(shape, bool(visible)) if isinstance(visible, np.bool_) else visible
