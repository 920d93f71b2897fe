"""The Triton kernels, interpreted, against the definition."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from kernels.block_sparse_attention import flash, gpu, mosaic, triton
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL
from kernels.block_sparse_attention.triton import diagonals
from kernels.block_sparse_attention.triton.lists import END, FULL, LINE, MASKED, lines
from kernels.block_sparse_attention.triton.sizes import tilings
from tests.kernels.backends import BackendTests, Shape, draw


class TestTriton(BackendTests):
    backend = "gpu"

    @pytest.mark.parametrize("bias", ["distances", "buckets", "array", "array of a row"])
    def test_blocks_of_several_tiles(self, bias, monkeypatch):
        """float32 tiles are 32 to 64 slots, blocks here 128; diagonals are cut in pieces."""
        monkeypatch.setattr(diagonals, "SHORTEST", 2)
        monkeypatch.setattr(diagonals, "PIECES_PER_DIAGONAL", 1000)
        monkeypatch.setattr(self, "block", 128, raising=False)
        shape = Shape(batch=2, q_blocks=1.7, kv_blocks=2, head_dim=64, heads=2, kv_heads=1)
        self.check("global columns" if bias == "distances" else "window", shape=shape, bias=bias)

    def test_head_dims_between_powers_of_two_and_float16(self):
        shape = dataclasses.replace(self.shape, head_dim=24)
        self.check("causal", shape=shape, bias="distances")
        self.check("causal", shape=shape, dtype=jnp.float16, tolerance=5e-3)


def prepared(mask, *, head_dim=64, dtype=jnp.bfloat16, blocks=(64, 64), heads=(1, 1), **options):
    arrays = draw(Shape(1, 4, 4, *heads, head_dim), 64, dtype)
    settings = {"bias": None, "scale": 1.0, "logits_soft_cap": None} | options
    return flash.prepare(triton, *arrays, mask, block_sizes=blocks, **settings)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("xp", [np, jnp])
def test_full_entries_precede_partial_ones_and_long_lines_short_ones(xp, by_row):
    ids = xp.asarray(np.repeat([[1, 1, 2, 0]], 64, axis=1).astype(np.int32))
    mask = masks.Segments(ids, ids) & masks.Causal()
    work = jax.tree.map(np.asarray, lines(prepared(mask).problem, by_row=by_row))
    lengths = []
    for plan in work.plan[0, 0]:
        kinds = work.flags[0, 0] & (ACTIVE | PARTIAL)
        assert np.all(kinds[plan[FULL] : plan[MASKED]] == ACTIVE)
        assert np.all(kinds[plan[MASKED] : plan[END]] == ACTIVE | PARTIAL)
        lengths.append(plan[END] - plan[FULL])
    assert lengths == [2, 1, 1, 0] and sorted(work.plan[0, 0, :, LINE]) == [0, 1, 2, 3]


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "12.0"])
def test_tiles_are_powers_of_two_that_shrink_with_shared_memory(capability):
    for head_dim in (16, 32, 64, 128, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            for staged in (0, 4, 5):
                chosen = tilings(head_dim, dtype, staged, capability)
                largest = tilings(head_dim, dtype, 0, "9.0")
                for name, tiling in vars(chosen).items():
                    assert tiling.stages >= 1 and tiling.warps in (4, 8)
                    for side in (tiling.q, tiling.kv):
                        assert side >= 16 and side & (side - 1) == 0
                    bound = getattr(largest, name)
                    assert tiling.q <= bound.q and tiling.kv <= bound.kv


@pytest.mark.parametrize(
    "reason, options",
    [
        ("head dim 320", {"head_dim": 320}),
        ("blocks of 8", {"blocks": (8, 64)}),
        ("float16", {"dtype": jnp.float8_e4m3fn}),
        (None, {"dtype": jnp.float16, "blocks": (96, 48)}),
    ],
)
def test_refusals(reason, options):
    call = prepared(masks.Causal(), **options)
    said = triton.refusal(call.problem, call.bias, call.q, call.k, call.v)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "kind, head_dim, path",
    [
        ("NVIDIA H100 80GB HBM3", 64, mosaic),
        ("NVIDIA GH200 480GB", 128, mosaic),
        ("NVIDIA H100 80GB HBM3", 32, triton),
        ("NVIDIA A100-SXM4-80GB", 64, triton),
        ("", 64, triton),
    ],
)
def test_hopper_takes_the_kernels_written_for_it(monkeypatch, kind, head_dim, path):
    monkeypatch.setattr(gpu, "_device_kind", lambda: kind)
    monkeypatch.setattr(mosaic, "_compiler", lambda: None)
    call = prepared(masks.Causal(), head_dim=head_dim)
    assert gpu._path(call.problem, call.bias, call.q, call.k, call.v) is path
