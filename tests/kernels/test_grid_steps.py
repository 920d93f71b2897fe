"""Kernels walk active blocks, not the widest row of blocks: the gap to splash attention."""

import numpy as np
import pytest

from kernels import masks
from kernels.block_sparse_attention import flash
from kernels.block_sparse_attention.problem import ACTIVE


def steps_and_active(mask, length, block):
    """Grid steps by row (forward, dq) and by column (dk, dv), and blocks that are active."""
    problem = flash.make_problem(mask, length, length, (block, block), scale=1.0, soft_cap=None)
    active = {int((b.flags & ACTIVE != 0).sum()) for b in (problem.by_row, problem.by_col)}
    assert len(active) == 1
    return problem.by_row.num_steps, problem.by_col.num_steps, active.pop()


@pytest.mark.parametrize(
    ("length", "block", "expected"), [(4096, 256, 74), (65536, 512, 634)], ids=["4k", "64k"]
)
def test_a_window_with_one_global_row_and_column(length, block, expected):
    mask = masks.SlidingWindow(block, block) | masks.GlobalTokens(1)
    assert steps_and_active(mask, length, block) == (expected, expected, expected)


@pytest.mark.parametrize(
    "mask",
    [
        masks.BigBird(block_size=256, window_blocks=3, global_blocks=1, random_blocks=3),
        masks.BigBird(block_size=64, window_blocks=3, global_blocks=2, random_blocks=3, seed=1),
        masks.Causal() & (masks.SlidingWindow(512, 0) | masks.GlobalTokens(16)),
        masks.SlidingWindow(300, 0) | masks.GlobalTokens(flags=(np.arange(4096) % 1500 == 7)[None]),
    ],
    ids=["BigBird of 256", "BigBird of 64", "causal", "scattered globals"],
)
def test_steps_over_active_blocks(mask):
    by_row, by_col, active = steps_and_active(mask, 4096, 256)
    assert max(by_row, by_col) <= 1.05 * active


def test_lines_without_a_block_cost_one_step_each():
    seen = np.zeros((4096, 4096), bool)
    seen[:256, :256] = True
    assert steps_and_active(masks.Dense(seen), 4096, 256) == (16, 16, 1)
