"""The kernels for Hopper, interpreted, against the definition.

The interpreter runs warpgroups as threads with their barriers and copies, and looks for races.
What it cannot know, layouts of registers and wgmma itself, is proved by lowering here and by
compilation in tests/hardware.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels import masks
from kernels.block_sparse_attention import flash, mosaic, reference
from kernels.block_sparse_attention.mosaic import compiler
from kernels.block_sparse_attention.mosaic.lines import MAX_SHARED_BYTES, Lines, Plan
from kernels.block_sparse_attention.mosaic.tiles import WARPGROUP_ROWS, Units
from kernels.block_sparse_attention.softmax import LOG2_E
from tests.kernels.backends import Shape, draw, fast_jit

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
INTERPRETED = InterpretGPUParams(detect_races=True)


@pytest.fixture
def interpreter(monkeypatch):
    """Fails on races, and compiles a kernel once: jax 0.10.2's interpreter would do so again in
    each thread of each program."""
    lock, compiled, races = threading.Lock(), {}, []
    make_races = gpu_callbacks.RaceDetectionState

    def recorded(*args, **kwargs):
        races.append(make_races(*args, **kwargs))
        return races[-1]

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                function = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                lowered = function.lower(consts, *args)
                compiled[id(jaxpr)] = jaxpr, lowered.compile(compiler_options=FAST)
        compiled[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(gpu_callbacks, "RaceDetectionState", recorded)
    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
    yield
    assert races and not any(state.races_found for state in races)


def evaluate(attention, arrays, weights):
    """(output, log-sum-exp) and the gradients of a scalar of both."""

    def scalar(arrays):
        output, log_sum_exp = attention(*arrays)
        finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0.0)
        return jnp.sum(output.astype(jnp.float32) * weights) + finite.sum(), (output, log_sum_exp)

    (_, outputs), gradients = fast_jit(jax.value_and_grad(scalar, has_aux=True))(arrays)
    return [*outputs, *gradients]


def prepared(arrays, mask, blocks, soft_cap=None, bias=None):
    return flash.prepare(
        mosaic,
        *arrays,
        mask,
        bias=bias,
        scale=arrays[0].shape[-1] ** -0.5,
        logits_soft_cap=soft_cap,
        block_sizes=blocks,
    )


def compute(arrays, mask, blocks, soft_cap=None):
    weights = np.random.default_rng(1).normal(size=arrays[0].shape)

    def interpreted(q, k, v):
        call = prepared((q, k, v), mask, blocks, soft_cap)
        assert mosaic.refusal(call.problem, call.bias, call.q, call.k, call.v) is None
        return flash.run(mosaic, call, q.shape[1], interpret=INTERPRETED)

    return evaluate(interpreted, arrays, weights)


def expected(arrays, mask, soft_cap=None):
    weights = np.random.default_rng(1).normal(size=arrays[0].shape)
    scale = arrays[0].shape[-1] ** -0.5

    def defined(q, k, v):
        return reference.attention(q, k, v, mask, bias=None, scale=scale, logits_soft_cap=soft_cap)

    return evaluate(defined, [x.astype(jnp.float32) for x in arrays], weights)


def assert_close(actual, wanted):
    for name, a, w in zip(("out", "lse", "dq", "dk", "dv"), actual, wanted, strict=True):
        a, w = np.asarray(a, np.float32), np.asarray(w)
        size = np.abs(w[np.isfinite(w)]).max()
        np.testing.assert_allclose(a, w, rtol=0, atol=1e-2 * size, err_msg=name)


def test_two_warpgroups_share_a_line(interpreter):
    """Rows of 128, two query heads a kv head, and lengths that are no multiples of the block."""
    arrays = draw(Shape(1, 200 / 128, 2, 2, 1, 64), 128, jnp.bfloat16)
    wanted = expected(arrays, masks.Causal())
    assert_close(compute(arrays, masks.Causal(), (128, 128)), wanted)


def test_each_warpgroup_has_a_line_of_its_own(interpreter):
    """Rows of 64 with 3 and 4 blocks listed on the device, a soft cap, and queries that see
    nothing."""
    arrays = draw(Shape(1, 2, 4, 1, 1, 64), 64, jnp.float16)
    q_ids, kv_ids = (jnp.arange(128) < 110)[None], (jnp.arange(256) % 5 != 0)[None]
    mask = masks.Segments(q_ids * 1, kv_ids * 2 - 1) & masks.Causal(offset=128)
    actual = compute(arrays, mask, (64, 64), soft_cap=5.0)
    assert np.isneginf(actual[1][0, 110:]).all()
    assert_close(actual, expected(arrays, mask, soft_cap=5.0))


def test_the_ring_is_reused(interpreter):
    """One row of 64 over more tiles than there are buffers, and dk and dv in kernels of their own,
    at the largest head size."""
    arrays = draw(Shape(1, 1, 5, 1, 1, 256), 64, jnp.bfloat16)
    mask = masks.BigBird(64, 3, 1, 1)
    assert_close(compute(arrays, mask, (64, 64)), expected(arrays, mask))


def test_lists_of_each_head_of_each_row_of_a_batch(interpreter):
    """Two query heads a kv head, one of which has no block at all in one row of the batch."""
    arrays = draw(Shape(2, 2, 2, 2, 1, 64), 64, jnp.bfloat16)
    columns = [[[[0, 1], [1, -1]], [[1, -1], [0, 1]]], [[[-1, -1], [0, -1]], [[1, 0], [-1, -1]]]]
    mask = masks.BlockIndex(jnp.array(columns), 64, 64)
    assert_close(compute(arrays, mask, (64, 64)), expected(arrays, mask))


def test_inactive_blocks_are_never_read(interpreter):
    arrays = draw(Shape(1, 2, 2, 1, 1, 64), 64, jnp.bfloat16)
    ids = np.repeat([[1, 2]], 64, axis=1).astype(np.int32)
    spoilt = [x.at[:, 64:].set(jnp.nan) for x in arrays]
    call = prepared(spoilt, masks.Segments(ids, ids), (64, 64))
    out, lse = mosaic.forward(call.problem, None, call.q, call.k, call.v, interpret=INTERPRETED)
    assert np.isfinite(out[:, :, :64]).all() and np.isnan(out[:, :, 64:]).all()
    clean = jnp.where(jnp.isnan(out), 0, out)
    _, *gradients = mosaic.backward(
        call.problem, None, call.q, call.k, call.v, clean, lse, lse, clean, interpret=INTERPRETED
    )
    for gradient in gradients:
        assert np.isfinite(gradient[:, :, :64]).all() and np.isnan(gradient[:, :, 64:]).all()


@pytest.mark.parametrize("head_dim, blocks", [(64, 128), (128, 64), (256, 128)])
def test_layouts_agree(head_dim, blocks):
    """Lowering checks every layout; no GPU and no CUDA are asked for."""
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    array = jax.ShapeDtypeStruct((1, 256, 2, head_dim), jnp.bfloat16)

    def output(q, k, v, ids):
        mask = masks.Segments(ids, ids) & masks.Causal() | masks.Dilated(3, 3, 2)
        call = prepared((q, k, v), mask, (blocks, blocks), soft_cap=30.0)
        return flash.run(mosaic, call, 256, interpret=False)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(output, argnums=(0, 1, 2))).trace(array, array, array, ids)
    text = gradient.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == (3 if head_dim <= 128 else 4)


def loss(q, k, v, ids):
    mask = masks.Segments(ids, ids) & masks.Causal()
    call = prepared((q, k, v), mask, (64, 64))
    return flash.run(mosaic, call, q.shape[1], interpret=False)[0].astype(jnp.float32).sum()


def mapped(*arrays):
    return jax.vmap(loss)(*arrays).sum()


def scanned(*arrays):
    step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
    return jax.lax.scan(step, jnp.float32(0), arrays)[0]


def sharded(*arrays):
    """With the default check of what varies along which axes of the mesh."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P(None, "data"),) * 4, out_specs=jax.P()
    )
    def summed(*arrays):
        return jax.lax.psum(mapped(*arrays), "data")

    return summed(*arrays)


@pytest.mark.parametrize("function", [mapped, scanned, sharded])
def test_transformations_lower(function):
    x = jax.ShapeDtypeStruct((3, 1, 128, 2, 64), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((3, 1, 128, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((3, 1, 128), jnp.int32)
    gradient = jax.jit(jax.grad(function, argnums=(0, 1, 2))).trace(x, keys, keys, ids)
    text = gradient.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
    assert "1x2x128x64xf32" in text  # keys' gradients of each query head, not yet rounded


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_units(scale, soft_cap):
    """Base-2 exponents of any scale and cap, and the cap's derivative."""
    units, products = Units(scale, soft_cap), jnp.linspace(-30, 30, 101)

    def logit(product):
        return (
            product * scale if soft_cap is None else soft_cap * jnp.tanh(product * scale / soft_cap)
        )

    raw = units.logits(products)
    np.testing.assert_allclose(raw * units.factor / LOG2_E, logit(products), atol=1e-5)
    slope = units.slope(raw)
    derivative = jax.vmap(jax.grad(logit))(products)
    np.testing.assert_allclose(scale * (1 if slope is None else slope), derivative, atol=1e-5)


@pytest.mark.parametrize(
    "reason, head_dim, dtype, blocks, mask, bias",
    [
        ("head dims", 32, jnp.bfloat16, 64, masks.Causal(), None),
        ("float32", 64, jnp.float32, 64, masks.Causal(), None),
        ("64 rows", 64, jnp.bfloat16, 16, masks.Causal(), None),
        ("whole arrays", 64, jnp.bfloat16, 64, masks.Dense(np.eye(64, dtype=bool)), None),
        ("bias", 64, jnp.bfloat16, 64, masks.Causal(), np.zeros((1, 1, 64, 64), np.float32)),
        (None, 64, jnp.bfloat16, 64, masks.Causal(), None),
    ],
)
def test_refusals(reason, head_dim, dtype, blocks, mask, bias):
    arrays = draw(Shape(1, 1, 1, 1, 1, head_dim), 64, dtype)
    call = prepared(arrays, mask, (blocks, blocks), bias=bias)
    said = mosaic.refusal(call.problem, call.bias, call.q, call.k, call.v)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "version, masked, refused",
    [
        ((12, 8, 61), True, True),
        ((12, 9, 41), True, True),
        ((12, 9, 41), False, False),
        ((12, 9, 86), True, False),
        ((12, 6, 85), True, False),
        ((13, 0, 48), True, False),
        (None, True, False),
    ],
)
def test_compilers_that_miscompile_masks_are_refused(monkeypatch, version, masked, refused):
    monkeypatch.setattr(compiler, "version", lambda: version)
    arrays = draw(Shape(1, 1, 1, 1, 1, 64), 64, jnp.bfloat16)
    call = prepared(arrays, masks.Causal() if masked else masks.Full(), (64, 64))
    said = mosaic.refusal(call.problem, call.bias, call.q, call.k, call.v)
    assert ("ptxas" in said) if refused else (said is None)


@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
@pytest.mark.parametrize("block", [64, 128, 192, 256])
def test_plans_fit_shared_memory(head_dim, block):
    """With a buffer to fill while another is read, but at the largest head size."""
    least = 2 if head_dim <= 128 else 1
    for num_lines in (3, 4):
        for operands in range(5):
            for tile, row in ((128 if head_dim <= 128 else 64, 2), (64, 4)):
                row, slot = row * head_dim + 8 + 4 * operands, 4 * head_dim + 8 + 4 * operands
                plan = Plan.make(num_lines, block, block, tile, row, slot)
                assert plan.slots >= least and num_lines % plan.lanes == 0
                assert block % plan.rows == 0 and block % plan.tile == 0
                size = plan.computing * WARPGROUP_ROWS * row + plan.ring * plan.tile * slot
                assert size <= MAX_SHARED_BYTES


def test_longest_lines_come_first():
    arrays = draw(Shape(1, 4, 4, 1, 1, 64), 64, jnp.bfloat16)
    problem = prepared(arrays, masks.Causal(), (64, 64)).problem
    order, *_ = Lines.arrays(problem.by_row, by_row=True)
    np.testing.assert_array_equal(order, [[[3, 2, 1, 0]]])
    order, *_ = Lines.arrays(problem.by_col, by_row=False)
    np.testing.assert_array_equal(order, [[[0, 1, 2, 3]]])
