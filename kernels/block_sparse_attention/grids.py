"""From a mask over slots to one over whole blocks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.block_sparse_attention.blocks import Grid
from kernels.masks import Builder, Expr, Mask
from kernels.masks.base import Atom


def grid_of(mask: Mask, q_len: int, kv_len: int, sizes: tuple[int, int]) -> Grid:
    """The mask over lengths padded to whole blocks of at most `sizes`."""
    is_one_block = tuple(sizes) == (q_len, kv_len)
    build = (_PerSlot if is_one_block else Builder)(q_len, kv_len)
    expr = mask.expression(build)
    block_q = _within([atom.block_q for atom in build.atoms], sizes[0])
    block_kv = _within([atom.block_kv for atom in build.atoms], sizes[1])
    padded_q, padded_kv = _up(q_len, block_q), _up(kv_len, block_kv)
    if padded_kv > kv_len:
        expr &= build.key() < kv_len
    build.q_len, build.kv_len = padded_q, padded_kv
    build.queries = [_repeat_last(x, padded_q, -1) for x in build.queries]
    build.keys = [_repeat_last(x, padded_kv, -1) for x in build.keys]
    build.pairs = [_repeat_last(_repeat_last(x, padded_q, -2), padded_kv, -1) for x in build.pairs]
    return Grid(expr, build, block_q, block_kv, mask.row_bound(block_q, block_kv))


class _PerSlot(Builder):
    """Writes patterns of blocks out for pairs of slots, so that a call that is one block, as short
    rows are, stays one whatever its pattern's blocks."""

    def blocks(self, pattern: np.ndarray | jax.Array, block_q: int, block_kv: int) -> Expr:
        return self.pair(Atom(pattern, block_q, block_kv).per_slot(self.q_len, self.kv_len))


def _within(patterns: list[int], size: int) -> int:
    """The largest block up to `size` that lies within a block of every pattern."""
    if not patterns:
        return size
    common = math.gcd(*patterns)
    return max(n for n in range(1, min(size, common) + 1) if common % n == 0)


def _up(length: int, block: int) -> int:
    return -(-length // block) * block


def _repeat_last(x: np.ndarray | jax.Array, length: int, axis: int) -> np.ndarray | jax.Array:
    """Pads an operand without widening the range of its last block."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths, mode="edge")
