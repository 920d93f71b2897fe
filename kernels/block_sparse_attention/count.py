"""How many pairs a mask shows, without writing the mask out."""

from __future__ import annotations

import numpy as np

from kernels.block_sparse_attention.blocks import known
from kernels.block_sparse_attention.flash import make_problem
from kernels.block_sparse_attention.grids import grid_of
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL
from kernels.masks import Mask


def visible_pairs(mask: Mask, q_len: int, kv_len: int, block: int = 128) -> int:
    """Pairs of query and key that see, of one row and head.

    Args:
      mask: without arrays that are data of the run, and the same for all rows and heads.
      q_len, kv_len: slots.
      block: slots of the blocks that are counted at once; only partial ones are evaluated.

    Raises:
      ValueError: the mask is not known on the host, or differs between rows or heads.
    """
    problem = make_problem(mask, q_len, kv_len, (block, block), scale=1.0, soft_cap=None)
    blocks = problem.by_row
    if not problem.is_static or blocks.rows.shape[:2] != (1, 1):
        raise ValueError("pairs are counted of masks that are one and the same for every call")
    entries = zip(blocks.rows[0, 0], blocks.cols[0, 0], blocks.flags[0, 0], strict=True)
    total = 0
    for row, col, flags in entries:
        if not flags & ACTIVE:
            continue
        q = np.arange(row * problem.block_q, (row + 1) * problem.block_q, dtype=np.int32)
        k = np.arange(col * problem.block_kv, (col + 1) * problem.block_kv, dtype=np.int32)
        q = q[q < q_len]
        if not flags & PARTIAL:
            total += q.size * k.size
            continue
        query = [x[0, 0, q, None] for x in problem.query]
        key = [x[0, 0, None, k] for x in problem.key]
        pair = [x[0, 0][np.ix_(q, k)] for x in problem.pair]
        total += int(np.sum(problem.tile(q[:, None], k[None, :], query, key, pair, int(flags))))
    return total


def load_of_parts(mask: Mask, q_len: int, kv_len: int, parts: int, block: int = 128) -> np.ndarray:
    """The share of their blocks that equal parts of the queries see, float [parts].

    Where what the mask shows is known at run time alone, blocks count as seen.
    """
    grid = grid_of(mask, q_len, kv_len, (min(block, -(-q_len // parts)), block))
    seen = known(grid).any.mean((0, 1, 3))  # [R]
    part = np.minimum(np.arange(seen.size) * parts // seen.size, parts - 1)
    return np.bincount(part, seen, parts) / np.bincount(part, minlength=parts)
