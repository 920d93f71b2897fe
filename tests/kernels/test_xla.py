"""The XLA backend against the reference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_cpu
from kernels import attention, masks
from kernels.block_sparse_attention import flash, xla
from kernels.block_sparse_attention.xla.strips import Walk
from tests.kernels.backends import BackendTests, Shape, draw


class TestXla(BackendTests):
    backend = "xla"


class TestXlaOneBlock(BackendTests):
    """What short rows and decoding steps are: blocks hold whole rows, unless the mask is made of
    smaller ones."""

    backend = "xla"
    block = 48
    shape = Shape(q_blocks=0.75, kv_blocks=1, head_dim=8)

    test_head_dims = test_large_logits_do_not_overflow = None
    test_inactive_blocks_are_never_read = test_vmap_scan_and_remat = test_shard_map = None


def problem_of(mask: masks.Mask, length: int, block: int):
    return flash.make_problem(mask, length, length, (block, block), scale=1.0, soft_cap=None)


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ((1, 4096), (1, 4096)),
        ((114, 512), (114, 512)),
        ((512, 512), (128, 128)),
        ((300, 300), (104, 104)),
        ((32, 8192), (32, 128)),
    ],
)
def test_blocks_fit_the_length(lengths, expected):
    assert xla.block_sizes(*lengths, 64, jnp.float32) == expected


@pytest.mark.parametrize("length", [114, 199, 300, 600])
def test_patterns_of_blocks_keep_blocks_large(length):
    sizes = xla.block_sizes(length, length, 64, jnp.float32)
    mask = masks.BigBird(64)
    problem = flash.make_problem(mask, length, length, sizes, scale=1.0, soft_cap=None)
    assert min(problem.block_q, problem.block_kv) >= 32
    q, k, v = draw(Shape(1, length, length, 1, 1, 8), 1)
    actual, expected = (attention(q, k, v, mask, backend=name) for name in ("xla", "reference"))
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_steps_follow_the_sum_of_widths():
    """Of a row of 64 blocks and 63 rows of few, whose heads have lists of their own."""
    columns = np.full((1, 2, 64, 64), -1)
    columns[0, :, 0] = np.arange(64)
    columns[0, :, 1:, 0] = 5
    columns[0, 1, 1:, 1] = 6
    problem = problem_of(masks.BlockIndex(columns, 16, 16), 1024, 16)
    walk = Walk.of(problem, None, jnp.zeros((1, 2, 1024, 8)), jnp.zeros((1, 1, 1024, 8)))
    assert (walk.heads, walk.batch, walk.blocks) == (1, 1, 16)
    steps = np.ceil(np.diff(problem.by_row.offsets) / walk.blocks).sum((0, 2))
    np.testing.assert_array_equal(steps, [4 + 63, 4 + 63])


def test_steps_hold_whole_groups_of_heads():
    problem = problem_of(masks.Causal(), 512, 128)
    walk = Walk.of(problem, None, jnp.zeros((2, 12, 512, 8)), jnp.zeros((2, 4, 512, 8)))
    assert (walk.heads, walk.kv_heads, walk.batch, walk.blocks) == (6, 2, 1, 1)


def test_benchmark_runs():
    lines = attention_cpu.main(["--quick"])
    assert len(lines) == 5
