"""Masks made of whole blocks: BigBird, vertical and slash lines, a block index."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.masks.base import Array, Builder, Mask, check_counts
from kernels.masks.expression import Expr
from kernels.masks.order import Causal


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["block_size", "window_blocks", "global_blocks", "random_blocks", "seed", "causal"],
)
@dataclasses.dataclass(frozen=True)
class BigBird(Mask):
    """Window, global and random blocks (Zaheer et al. 2020, section 2 and appendix D).

    Blocks are counted from the start of the row, whatever is packed in it.

    Attributes:
      block_size: slots of a block; kernels work in blocks of at most this size.
      window_blocks: blocks of a row around its own, odd.
      global_blocks: the first blocks see all and are seen by all.
      random_blocks: further blocks of each row, drawn from `seed` and the row's number.
      causal: random blocks are drawn among those before a row, for decoders: then a longer row
        has the same pattern in front. Otherwise the draw depends on the length too.
    """

    block_size: int = 64
    window_blocks: int = 3
    global_blocks: int = 1
    random_blocks: int = 3
    seed: int = 0
    causal: bool = False

    def __post_init__(self):
        check_counts(self, 1, block_size=self.block_size, window_blocks=self.window_blocks)
        if self.window_blocks % 2 == 0:
            raise ValueError(f"BigBird.window_blocks = {self.window_blocks} must be odd")
        check_counts(
            self,
            global_blocks=self.global_blocks,
            random_blocks=self.random_blocks,
            seed=self.seed,
        )

    def expression(self, build: Builder) -> Expr:
        pattern = self.pattern(
            -(-build.q_len // self.block_size), -(-build.kv_len // self.block_size)
        )
        return build.blocks(pattern[None, None], self.block_size, self.block_size)

    def pattern(self, rows: int, cols: int) -> np.ndarray:
        """bool [rows, cols]: the blocks that are seen."""
        row, col = np.arange(rows)[:, None], np.arange(cols)[None, :]
        side = self.window_blocks // 2
        seen = np.abs(row - col) <= side
        seen |= (row < self.global_blocks) | (col < self.global_blocks)
        if not self.random_blocks:
            return seen
        for number in range(self.global_blocks, rows):
            before = np.arange(self.global_blocks, number - side)
            after = np.arange(max(self.global_blocks, number + side + 1), cols)
            others = before if self.causal else np.concatenate([before[before < cols], after])
            rng = np.random.default_rng((self.seed, number))
            drawn = rng.choice(others, min(self.random_blocks, others.size), replace=False)
            seen[number, drawn[drawn < cols]] = True
        return seen


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vertical", "slash"],
    meta_fields=["block_size"],
)
@dataclasses.dataclass(frozen=True)
class VerticalSlash(Mask):
    """Causal, limited to some keys and some distances (MInference, Jiang et al. 2024, section 3.2).

    Vertical lines are single keys. Slash lines are as wide as blocks, as in MInference's own
    kernel: a query sees every block that a line crosses within the query's block.

    Attributes:
      vertical: int [B or 1, H or 1, any], slots of keys; a negative one stands for none.
      slash: int [B or 1, H or 1, any], distances query - key; a negative one stands for none.
      block_size: slots of a block; kernels work in blocks of at most this size.
    """

    vertical: jax.Array
    slash: jax.Array
    block_size: int = 64

    def __post_init__(self):
        check_counts(self, 1, block_size=self.block_size)

    def expression(self, build: Builder) -> Expr:
        for name in ("vertical", "slash"):
            _check_integers(f"VerticalSlash.{name}", getattr(self, name), "B or 1, H or 1, any")
        keys = _members(self.vertical, build.kv_len)
        rows, cols = (-(-length // self.block_size) for length in (build.q_len, build.kv_len))
        # A line at distance s runs through the blocks floor(s / block) and, unless it lies on
        # their corners, floor(s / block) + 1 left of the diagonal.
        xp = np if isinstance(self.slash, np.ndarray) else jnp
        first = xp.where(self.slash < 0, -1, self.slash // self.block_size)
        crosses = (self.slash >= 0) & (self.slash % self.block_size != 0)
        second = xp.where(crosses, first + 1, -1)
        diagonals = _members(first, rows) | _members(second, rows)  # [.., rows left of diagonal]
        left = np.arange(rows)[:, None] - np.arange(cols)[None, :]
        pattern = diagonals[..., np.maximum(left, 0)] & (left >= 0)
        lines = build.key(keys).differs(0) | build.blocks(pattern, self.block_size, self.block_size)
        return Causal().expression(build) & lines


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["columns"],
    meta_fields=["block_q", "block_kv"],
)
@dataclasses.dataclass(frozen=True)
class BlockIndex(Mask):
    """Each block of queries names the blocks of keys it sees, in arrays known only at run time.

    Attributes:
      columns: int [B or 1, H or 1, R, W]: row r sees blocks columns[.., r, :], in any order;
        a negative one stands for none.
      block_q, block_kv: slots of the blocks; kernels work in blocks of at most these sizes.
    """

    columns: jax.Array
    block_q: int
    block_kv: int

    def __post_init__(self):
        check_counts(self, 1, block_q=self.block_q, block_kv=self.block_kv)

    def expression(self, build: Builder) -> Expr:
        rows, cols = -(-build.q_len // self.block_q), -(-build.kv_len // self.block_kv)
        _check_integers("BlockIndex.columns", self.columns, f"B or 1, H or 1, {rows}, any")
        if self.columns.shape[2] != rows:
            raise ValueError(
                f"a BlockIndex has columns {self.columns.shape}; {build.q_len} queries in blocks "
                f"of {self.block_q} want [B or 1, H or 1, {rows}, any]"
            )
        return build.blocks(_members(self.columns, cols), self.block_q, self.block_kv)

    def row_bound(self, block_q: int, block_kv: int) -> float:
        return self.columns.shape[-1] * (self.block_kv // block_kv)


def _check_integers(name: str, array: Array, axes: str) -> None:
    """Raises ValueError unless `array` is one of integers with as many axes as `axes` names."""
    if not isinstance(array, np.ndarray | jax.Array):
        raise ValueError(f"{name} is a {type(array).__name__}: give an int array [{axes}]")
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim != axes.count(",") + 1:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}: give an int array [{axes}]")


def _members(indices: Array, count: int) -> Array:
    """bool [.., count] from int [.., any]: True at each index in [0, count)."""
    if isinstance(indices, np.ndarray):
        return (indices[..., None] == np.arange(count)).any(-2)
    lead = np.indices((*indices.shape[:-1], 1))[:-1]
    slots = jnp.where((indices >= 0) & (indices < count), indices, count)
    found = jnp.zeros((*indices.shape[:-1], count + 1), bool).at[(*lead, slots)].set(True)
    return found[..., :count]
