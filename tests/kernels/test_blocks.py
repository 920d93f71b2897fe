"""Lists of active blocks: put together again they are the mask, and they hold no empty block."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from kernels import attention, masks
from kernels.block_sparse_attention.flash import make_problem
from kernels.block_sparse_attention.problem import ACTIVE, FIRST, LAST, PARTIAL
from tests.kernels.backends import MASKS, mask_cases
from tests.kernels.drawn_masks import drawn_masks, quick


def put_together(problem, batch: int, heads: int, by: str) -> np.ndarray:
    """The mask [B, H, Q, K] as a backend would see it, entry by entry; checks the list's order."""
    problem = jax.tree.map(np.asarray, problem)
    blocks, bq, bk = getattr(problem, by), problem.block_q, problem.block_kv
    seen = np.zeros((batch, heads, problem.q_len, problem.kv_len), bool)
    for b, h in np.ndindex(batch, heads):

        def group(x, b=b, h=h):
            return x[b % x.shape[0], h % x.shape[1]]

        rows, cols, flags, offsets = map(
            group, (blocks.rows, blocks.cols, blocks.flags, blocks.offsets)
        )
        lines, others = (rows, cols) if by == "by_row" else (cols, rows)
        assert not flags[offsets[-1] :].any()
        for line in range(blocks.num_lines):
            here = slice(offsets[line], offsets[line + 1])
            assert here.stop > here.start and np.all(lines[here] == line)
            assert np.all(np.diff(others[here]) > 0)
            firsts, lasts = flags[here] & FIRST, flags[here] & LAST
            assert firsts[0] and lasts[-1] and not firsts[1:].any() and not lasts[:-1].any()
        for r, c, flag in zip(rows, cols, flags, strict=True):
            if not flag & ACTIVE:
                continue
            q, k = slice(r * bq, (r + 1) * bq), slice(c * bk, (c + 1) * bk)
            tile = np.ones((bq, bk), bool)
            if flag & PARTIAL:
                tile = np.asarray(
                    problem.tile(
                        jnp.arange(q.start, q.stop)[:, None],
                        jnp.arange(k.start, k.stop)[None, :],
                        [group(x)[q][:, None] for x in problem.query],
                        [group(x)[k][None, :] for x in problem.key],
                        [group(x)[q, k] for x in problem.pair],
                        flag,
                    )
                )
            assert not seen[b, h, q, k].any()
            seen[b, h, q, k] = tile
    return seen


def check(mask, q_len: int, kv_len: int, block: tuple[int, int], on_host: bool, batch=2, heads=4):
    def make(mask):
        return make_problem(mask, q_len, kv_len, block, scale=1.0, soft_cap=None)

    problem = make(mask) if on_host else jax.jit(make)(mask)
    dense = np.broadcast_to(mask.dense(q_len, kv_len), (batch, heads, q_len, kv_len))
    for by in ("by_row", "by_col"):
        seen = put_together(problem, batch, heads, by)
        np.testing.assert_array_equal(seen[..., :q_len, :kv_len], dense)
        assert not seen[..., kv_len:].any()
    return problem


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    mask = mask_cases(16, 40, 48)[name]
    check(mask, 40, 48, (16, 16), on_host=True)


@given(mask=drawn_masks(), on_host=st.booleans(), block=st.sampled_from([(2, 2), (1, 2), (6, 6)]))
@quick(max_examples=40)
def test_drawn_masks(mask, on_host, block):
    check(mask, 6, 6, block, on_host)


def problem_of(mask, length: int, block: int):
    return make_problem(mask, length, length, (block, block), scale=1.0, soft_cap=None)


def active(problem) -> int:
    return int((np.asarray(problem.by_row.flags) & ACTIVE != 0).sum())


@pytest.mark.parametrize(
    "mask, expected",
    [
        (masks.Causal(), 136),
        (masks.SlidingWindow(256, 256), 46),
        (masks.SlidingWindow(255, 255) | masks.GlobalTokens(count=1), 74),
        (masks.BigBird(256, 3, 1, 0), 74),
        (masks.Causal() & ~masks.SlidingWindow(left=1023), 78),
        (masks.AShape(sink=4, window=255), 45),
        (masks.Dilated(1, 1, 512), 44),
    ],
)
def test_active_blocks_of_4096_tokens(mask, expected):
    """Counted by hand on the 16 by 16 grid of blocks of 256; the list is as long."""
    problem = problem_of(mask, 4096, 256)
    assert active(problem) == expected
    seen = mask.dense(4096, 4096)[0, 0].reshape(16, 256, 16, 256).any((1, 3))
    assert problem.by_row.num_steps == expected + int((~seen.any(1)).sum())
    assert problem.by_col.num_steps == expected + int((~seen.any(0)).sum())


def test_blocks_of_patterns_cut_the_kernels_blocks():
    mask = masks.BigBird(24) & masks.BlockIndex(np.zeros((1, 1, 3, 1), int), 36, 12)
    problem = problem_of(mask, 96, 128)
    assert (problem.block_q, problem.block_kv) == (12, 12)


def test_a_block_index_bounds_the_dynamic_list():
    columns = jnp.zeros((1, 1, 16, 2), jnp.int32)
    problem = jax.jit(lambda columns: problem_of(masks.BlockIndex(columns, 16, 16), 256, 16))(
        columns
    )
    assert problem.by_row.rows.shape[-1] == 16 * 2 + 16
    assert int(problem.by_row.num_steps) == 16


def steps_and_active(mask, length: int, block: int) -> tuple[int, int, int]:
    """Entries by row (forward, dq) and by column (dk, dv), and blocks that are active."""
    problem = problem_of(mask, length, block)
    return problem.by_row.num_steps, problem.by_col.num_steps, active(problem)


@pytest.mark.parametrize(
    ("length", "block", "expected"), [(4096, 256, 74), (65536, 512, 634)], ids=["4k", "64k"]
)
def test_a_window_with_one_global_row_and_column(length, block, expected):
    mask = masks.SlidingWindow(block, block) | masks.GlobalTokens(1)
    assert steps_and_active(mask, length, block) == (expected, expected, expected)


@pytest.mark.parametrize(
    "mask",
    [
        masks.BigBird(block_size=64, window_blocks=3, global_blocks=2, random_blocks=3, seed=1),
        masks.Causal() & (masks.SlidingWindow(512, 0) | masks.GlobalTokens(16)),
        masks.SlidingWindow(300, 0) | masks.GlobalTokens(flags=(np.arange(4096) % 1500 == 7)[None]),
    ],
    ids=["BigBird of 64", "causal", "scattered globals"],
)
def test_steps_over_active_blocks(mask):
    by_row, by_col, active = steps_and_active(mask, 4096, 256)
    assert max(by_row, by_col) <= 1.05 * active


def test_lines_without_a_block_cost_one_step_each():
    seen = np.zeros((4096, 4096), bool)
    seen[:256, :256] = True
    assert steps_and_active(masks.Dense(seen), 4096, 256) == (16, 16, 1)


def grids(jaxpr) -> list[tuple[int, ...]]:
    """The grids of the kernels in a program."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(eqn.params["grid_mapping"].grid)
        else:
            found += [
                grid for inner in jax.core.jaxprs_in_params(eqn.params) for grid in grids(inner)
            ]
    return found


def test_the_grids_of_a_tpus_kernels_are_as_long_as_the_list():
    """Forward, dq, and dk with dv: steps a head, where a padded grid has 16 * 16."""
    heads, mask = 4, masks.BigBird(256, window_blocks=3, global_blocks=1, random_blocks=3)
    q, kv = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (heads, 2))

    def loss(q, k, v):
        options = {"backend": "tpu", "block_sizes": (256, 256)}
        return attention(q, k, v, mask, **options).astype(jnp.float32).sum()

    found = grids(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv).jaxpr)
    assert len(found) == 3
    needed = active(problem_of(mask, 4096, 256))
    assert needed < 0.6 * 256
    assert all(math.prod(grid) / heads <= 1.05 * needed for grid in found)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.SlidingWindow(20, 9) | masks.GlobalTokens(count=1),
        masks.BigBird(48, 1, 1, 1),
        masks.Causal() & masks.Segments(*[np.arange(192)[None] // 50] * 2),
        masks.BlockIndex(np.array([[2, 0], [1, -1], [-1, -1]])[None, None], 64, 64),
    ],
)
def test_parts_of_the_queries_list_their_own_blocks(mask, on_host):
    """Three devices together list what one device would, each in its own order, whether it knows
    the mask's arrays beforehand or not; what it is to have is bounded by the longest list."""
    length, count, block = 192, 3, 16

    def make(part, mask):
        mask = masks.Part(mask, part, count)
        return make_problem(mask, length // count, length, (block, block), scale=1.0, soft_cap=None)

    whole = check(mask, length, length, (block, block), on_host=True, batch=1, heads=1)
    expected = np.asarray(whole.by_row.flags) & ACTIVE != 0
    places = np.stack([whole.by_row.rows, whole.by_row.cols])[:, expected]
    rows = length // count // block
    call = jax.jit(lambda part: make(part, mask)) if on_host else jax.jit(make)
    for part in range(count):
        problem = call(jnp.int32(part), *([] if on_host else [mask]))
        here = places[:, places[0] // rows == part] - [[rows * part], [0]]
        for blocks in (problem.by_row, problem.by_col):
            is_active = np.asarray(blocks.flags) & ACTIVE != 0
            found = np.stack([blocks.rows, blocks.cols])[:, is_active]
            assert sorted(map(tuple, found.T)) == sorted(map(tuple, here.T))
        assert blocks.num_steps <= blocks.rows.shape[-1]
        seen = put_together(problem, 1, 1, "by_row")[0, 0]
        own = slice(part * length // count, (part + 1) * length // count)
        np.testing.assert_array_equal(seen, mask.dense(length, length)[0, 0, own])


def test_a_part_pays_for_no_other_parts_blocks():
    """A window's list on one of eight devices is an eighth of the row's and its edges."""
    mask, length = masks.SlidingWindow(64, 64), 4096
    problem = jax.jit(
        lambda part, ids: make_problem(
            masks.Part(mask & masks.Segments(ids, ids), part, 8),
            length // 8,
            length,
            (64, 64),
            scale=1.0,
            soft_cap=None,
        )
    )(jnp.int32(3), jnp.ones((1, length), jnp.int32))
    assert problem.by_row.rows.shape[-1] == 3 * 8
