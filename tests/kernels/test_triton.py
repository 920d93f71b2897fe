"""The Triton kernels, interpreted, against the definition."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention, masks
from kernels.block_sparse_attention import api, device, flash, gpu, mosaic, triton
from kernels.block_sparse_attention.mosaic import compiler
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL
from kernels.block_sparse_attention.triton import diagonals
from kernels.block_sparse_attention.triton.lists import END, FULL, LINE, MASKED, lines
from kernels.block_sparse_attention.triton.sizes import HELD, Held, tilings
from kernels.block_sparse_attention.triton.tiles import Tiling
from tests.kernels.backends import BackendTests, Shape, draw, make_bias


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


@pytest.mark.parametrize("bias", ["distances", "buckets", "array", "array of a row"])
def test_shard_map_lowers_with_its_check_of_what_varies(bias):
    """Its default, which the interpreter does not pass: the batch's shards add up the gradient of
    a bias that they share."""
    arrays = draw(Shape(2, 2, 2, 2, 1, 64), 64)
    ids = jnp.ones((2, 128), jnp.int32)
    bias = make_bias(bias, Shape(1, 2, 2, 2, 1, 64), 64)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=((jax.P("data"),) * 3, jax.P()), out_specs=jax.P("data")
    )
    def sharded(arrays, bias):
        mask = masks.Segments(ids[: arrays[0].shape[0]], ids[:1]) & masks.Causal()
        settings = {"bias": bias, "scale": 1.0, "logits_soft_cap": 5.0, "block_sizes": (64, 64)}
        call = flash.prepare(triton, *arrays, mask, **settings)
        return flash.run(triton, call, 128, interpret=False)[0]

    traced = jax.jit(jax.grad(lambda *x: sharded(*x).sum(), (0, 1), allow_int=True)).trace(
        tuple(arrays), bias
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4


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


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_older_and_other_devices_are_left_to_xla(monkeypatch, capability):
    monkeypatch.setattr(device, "capability", lambda: capability)
    call = prepared(masks.Causal())
    arguments = call.problem, call.bias, call.q, call.k, call.v
    for path in (triton, gpu):
        assert f"compute capability {capability}" in path.refusal(*arguments)
    monkeypatch.setattr(api, "platform", lambda: "gpu")
    q = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.bfloat16)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: attention(x, x, x))(q))
    monkeypatch.setattr(device, "capability", lambda: "8.0")
    assert "pallas_call" in str(jax.make_jaxpr(lambda x: attention(x, x, x))(q))


@pytest.mark.parametrize(
    "kind, capability",
    [
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("NVIDIA A100-SXM4-80GB", "8.0"),
        ("NVIDIA B200", "10.0"),
        ("NVIDIA L4", "8.6"),
        ("NVIDIA RTX A6000", "8.6"),
        ("Tesla T4", "7.5"),
        ("NVIDIA GeForce RTX 2080 Ti", "7.5"),
        ("Tesla V100-SXM2-16GB", "7.0"),
        ("AMD Instinct MI300X", "gfx"),
    ],
)
def test_absent_devices_are_known_by_name_and_present_ones_asked(monkeypatch, kind, capability):
    absent = types.SimpleNamespace(platform="gpu", device_kind=kind)
    mesh = types.SimpleNamespace(abstract_device=absent)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert device.capability() == capability
    present = types.SimpleNamespace(device_kind=kind, compute_capability="9.1")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [present])
    assert device.capability() == "9.1"
    absent.platform = "cpu"
    assert device.capability() is None


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "12.0"])
def test_tiles_are_powers_of_two_that_fit_shared_memory(capability):
    limit = {"8.0": 163, "8.6": 99, "9.0": 227, "12.0": 99}[capability] * 1024
    for head_dim in (16, 32, 64, 128, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            width = head_dim * jnp.dtype(dtype).itemsize
            for staged in (0, 4, 5):
                chosen = tilings(head_dim, dtype, staged, capability)
                largest = tilings(head_dim, dtype, 0, "9.0")
                for name, tiling in vars(chosen).items():
                    assert tiling.stages >= 1 and tiling.warps in (4, 8)
                    for side in (tiling.q, tiling.kv):
                        assert side >= 16 and side & (side - 1) == 0
                    bound = getattr(largest, name)
                    assert tiling.q <= bound.q and tiling.kv <= bound.kv
                    assert HELD[name].shared_bytes(tiling, width, staged) <= limit


def test_shared_memory_of_a_tiling():
    """By hand: 128 rows kept of one array, three stages of 64 rows of two, 4 bytes an element."""
    held = Held("q", kept=1, moved=2)
    assert held.shared_bytes(Tiling(128, 64, warps=4, stages=3), width=256, staged=4) == (
        128 * 256 + 3 * (2 * 64 * 256 + 128 * 64 * 4)
    )


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
    "capability, head_dim, path",
    [("9.0", 64, mosaic), ("9.0", 32, triton), ("8.0", 64, triton), (None, 64, triton)],
)
def test_hopper_takes_the_kernels_written_for_it(monkeypatch, capability, head_dim, path):
    monkeypatch.setattr(device, "capability", lambda: capability)
    monkeypatch.setattr(compiler, "version", lambda: None)
    call = prepared(masks.Causal(), head_dim=head_dim)
    assert gpu._path(call.problem, call.bias, call.q, call.k, call.v) is path
