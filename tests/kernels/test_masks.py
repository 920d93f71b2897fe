"""Masks against their definitions, slot by slot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kernels import masks

FLAGS = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
IDS = np.array([[1, 1, 2, 0], [1, 2, 2, 2]])


def by_definition(sees, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    """bool [B, Q, K] of sees(row, query slot, key slot)."""
    entries = [
        [[bool(sees(b, i, j)) for j in range(kv_len)] for i in range(q_len)] for b in range(batch)
    ]
    return np.array(entries)


CASES = {
    "full": (masks.Full(), lambda b, i, j: True),
    "causal": (masks.Causal(), lambda b, i, j: j <= i),
    "strictly causal": (masks.Causal(offset=-1), lambda b, i, j: j < i),
    "prefix flags": (masks.Prefix(FLAGS), lambda b, i, j: FLAGS[b, i] and FLAGS[b, j]),
    "prefix lengths": (
        masks.Prefix(np.array([3, 0])),
        lambda b, i, j: i < (3, 0)[b] and j < (3, 0)[b],
    ),
    "segments": (
        masks.Segments(IDS, IDS),
        lambda b, i, j: IDS[b, i] == IDS[b, j] and IDS[b, i] != 0,
    ),
    "window": (masks.SlidingWindow(left=1, right=0), lambda b, i, j: i - 1 <= j <= i),
    "half open window": (masks.SlidingWindow(right=1), lambda b, i, j: j <= i + 1),
    "dense": (masks.Dense(FLAGS[:, None, :] != 0), lambda b, i, j: FLAGS[b, j]),
    "causal or prefix": (
        masks.Causal() | masks.Prefix(FLAGS),
        lambda b, i, j: j <= i or (FLAGS[b, i] and FLAGS[b, j]),
    ),
    "dilated": (masks.Dilated(left=1, right=0, dilation=2), lambda b, i, j: j in (i - 2, i)),
    "a shape": (masks.AShape(sink=1, window=1), lambda b, i, j: j <= i and (j < 1 or j >= i - 1)),
    "first tokens": (masks.GlobalTokens(count=1), lambda b, i, j: i == 0 or j == 0),
    "global columns": (
        masks.GlobalTokens(flags=FLAGS, rows=False),
        lambda b, i, j: FLAGS[b, j],
    ),
    "bigbird": (
        masks.BigBird(1, window_blocks=3, global_blocks=1, random_blocks=0),
        lambda b, i, j: abs(i - j) <= 1 or i == 0 or j == 0,
    ),
    "vertical and slash": (
        masks.VerticalSlash(np.array([[[1, -1]]]), np.array([[[3, -1]]]), block_size=1),
        lambda b, i, j: j <= i and (j == 1 or i - j == 3),
    ),
    "slash through two blocks": (
        masks.VerticalSlash(np.array([[[-1]]]), np.array([[[1]]]), block_size=2),
        lambda b, i, j: j <= i and (i // 2 - j // 2) in (0, 1),
    ),
    "block index": (
        masks.BlockIndex(np.array([[[[1], [-1]]]]), 2, 2),
        lambda b, i, j: i < 2 <= j,
    ),
    "and not": (
        masks.Causal() & ~masks.SlidingWindow(left=0, right=0),
        lambda b, i, j: j <= i and i != j,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_definition(name):
    mask, sees = CASES[name]
    dense = mask.dense(4, 4)
    assert dense.shape in ((1, 1, 4, 4), (2, 1, 4, 4))
    np.testing.assert_array_equal(
        np.broadcast_to(dense[:, 0], (2, 4, 4)), by_definition(sees, 2, 4, 4)
    )
    assert dense.dtype == bool


@given(start=st.integers(0, 6), length=st.integers(1, 3), prefix=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_positions_pick_rows_of_the_whole_mask(start, length, prefix):
    positions = np.arange(start, start + length)[None]
    whole = masks.Causal() | masks.Prefix(np.array([prefix]))
    step = masks.Causal(q_positions=positions) | masks.Prefix(
        np.array([prefix]), q_positions=positions
    )
    expected = whole.dense(9, 9)[:, :, start : start + length]
    np.testing.assert_array_equal(step.dense(length, 9), expected)


def test_masks_pass_through_jit_as_arguments():
    mask = masks.Causal(offset=1) & masks.Segments(IDS, IDS)
    dense = jax.jit(lambda m: m.dense(4, 4))(mask)
    np.testing.assert_array_equal(dense, mask.dense(4, 4))


@pytest.mark.parametrize(
    "pattern, large",
    [
        (masks.BigBird(2, 1, 1, 2, causal=True), masks.BigBird(128)),
        (
            masks.BlockIndex(np.array([[[[1], [0]]]]), 3, 2),
            masks.BlockIndex(np.zeros((1, 1, 32, 1), int), 128, 128),
        ),
    ],
    ids=["bigbird", "block index"],
)
def test_rows_of_a_pattern_of_blocks_without_its_square(pattern, large):
    """A decoding step's few rows of a pattern never become [L, L]."""
    slots, length = np.array([[4], [2]]), 6
    whole = pattern.dense(length, length)[0, 0]
    rows = masks.Rows(pattern, jnp.asarray(slots)).dense(1, length)
    np.testing.assert_array_equal(rows[:, 0], whole[slots])
    jaxpr = jax.make_jaxpr(lambda slots: masks.Rows(large, slots).dense(1, 4096))(slots)
    arrays = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars] + [v.aval for v in jaxpr.consts]
    assert max(np.prod(array.shape) for array in arrays) <= 2 * 4096


@pytest.mark.parametrize("seed", [0, 3])
def test_a_longer_row_has_the_same_causal_bigbird_in_front(seed):
    mask = masks.BigBird(2, 3, 1, 2, seed, causal=True) & masks.Causal()
    long, short = (np.asarray(mask.dense(n, n))[0, 0] for n in (30, 17))
    np.testing.assert_array_equal(long[:17, :17], short)
    blocks = mask.left.pattern(15, 15)
    assert blocks[5:].sum(1).tolist() == [3 + 1 + 2] * 9 + [2 + 1 + 2]
    others = masks.BigBird(2, 3, 1, 2, seed).pattern(15, 15)
    assert others[1:].sum(1).min() >= 5 and np.triu(others[1:], 2).any()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: masks.Dilated(1, 1, 0), "Dilated.dilation = 0"),
        (lambda: masks.Dilated(-1, 1, 2), "Dilated.left = -1"),
        (lambda: masks.Dilated(1, 2**20, 2**20), "Dilated.right = 1048576"),
        (lambda: masks.SlidingWindow(right=-1), "SlidingWindow.right = -1"),
        (lambda: masks.SlidingWindow(left=2**30), "SlidingWindow.left = 1073741824"),
        (lambda: masks.Causal(offset=-(2**31)), "Causal.offset = -2147483648"),
        (lambda: masks.AShape(-1, 2), "AShape.sink = -1"),
        (lambda: masks.AShape(1, None), "AShape.window = None"),
        (lambda: masks.BigBird(0), "BigBird.block_size = 0"),
        (lambda: masks.BigBird(window_blocks=2), "BigBird.window_blocks = 2 must be odd"),
        (lambda: masks.BigBird(random_blocks=-1), "BigBird.random_blocks = -1"),
        (lambda: masks.GlobalTokens(2, FLAGS), "GlobalTokens.count = 2 beside flags"),
        (lambda: masks.VerticalSlash(IDS, IDS, 0), "VerticalSlash.block_size = 0"),
        (lambda: masks.BlockIndex(IDS, 2, 0), "BlockIndex.block_kv = 0"),
        (lambda: masks.BlockIndex(IDS, 2, 2).dense(4, 4), "BlockIndex.columns is int"),
        (lambda: masks.BlockIndex([[[[0]]]], 4, 4).dense(4, 4), "BlockIndex.columns is a list"),
        (lambda: masks.BlockIndex(np.ones((1, 1, 2, 1)), 2, 2).dense(4, 4), "columns is float64"),
        (lambda: masks.VerticalSlash(IDS, IDS[None]).dense(4, 4), "VerticalSlash.vertical is"),
        (lambda: masks.Dense(FLAGS[0] != 0).dense(4, 4), r"Dense mask is \[4\]"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()
