"""Backward: dq and the bias's gradient by rows of blocks, dk and dv together by columns.

Both recompute p = exp(logits - lse) of each active block (Dao 2023, section 3.1).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bias import Lowered
from kernels.block_sparse_attention.problem import ACTIVE, FIRST, LAST, Problem
from kernels.block_sparse_attention.tpu.logits import LOG2_E, Logits, split
from kernels.block_sparse_attention.tpu.parts import mapped
from kernels.block_sparse_attention.tpu.steps import NN, NT, Steps, dot, struct

# Keys of a block that are computed at once. Two products more keep the columns' kernel from having
# registers for more than half a block of 256.
CHUNK = 256


def backward(
    problem: Problem,
    bias: Lowered,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See kernels.block_sparse_attention.flash.Backend."""
    del out
    arrays = q, k, v, lse, delta, d_out.astype(q.dtype)
    return mapped(functools.partial(_backward, interpret), problem, bias, *arrays)


def _backward(
    interpret: bool, problem: Problem, bias: Lowered, q, k, v, lse, delta, d_out
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    rows = lse.shape[:2] + (-1, problem.block_q)
    # Two rows a block of queries, one copy: base-2 log-sum-exp and delta.
    saved = jnp.stack([(lse * LOG2_E).reshape(rows), delta.reshape(rows)], 3)
    saved = saved.reshape(-1, *saved.shape[2:])
    d_bias, dq = _by_row(problem, bias, q, k, v, saved, d_out, interpret)
    dk, dv = _by_col(problem, bias, q, k, v, saved, d_out, interpret)
    return d_bias, dq, dk, dv


def _operands(steps: Steps, problem: Problem, q, k, v, saved, d_out) -> tuple:
    """What both kernels read, and the specs of blocks of queries and of keys."""
    bq, bk, head_dim = problem.block_q, problem.block_kv, q.shape[-1]
    rows = steps.spec((None, bq, head_dim), lambda at: (at.head, at.row, 0))
    cols = steps.spec((None, bk, head_dim), lambda at: (at.kv_head, at.col, 0))
    pairs = steps.spec((None, None, 2, bq), lambda at: (at.head, at.row, 0, 0))
    q, k, v, d_out = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, d_out))
    return ((q, rows), (k, cols), (v, cols), (d_out, rows), (saved, pairs)), rows, cols


def _by_row(problem, bias, q, k, v, saved, d_out, interpret) -> tuple[Lowered, jax.Array]:
    steps = Steps.of(problem, "row", q, k)
    logits = Logits.of(problem, bias, steps)
    operands, rows, _ = _operands(steps, problem, q, k, v, saved, d_out)
    bq, bk, head_dim = problem.block_q, problem.block_kv, q.shape[-1]
    turned = k.reshape(-1, k.shape[2] // bk, bk, head_dim).swapaxes(2, 3)
    turned_spec = steps.spec((None, None, head_dim, bk), lambda at: (at.kv_head, at.col, 0, 0))
    (arrays, specs) = split((*operands, (turned, turned_spec)))
    more, more_specs = split(logits.operands())
    inputs = q, k, v, d_out
    shapes, out_specs = [struct((operands[0][0].shape), q.dtype, *inputs)], [rows]
    aliases, zeros = {}, []
    gradient = logits.bias.gradient(steps)
    if gradient is not None:
        shapes.append(struct(gradient[0].shape, gradient[0].dtype, *inputs))
        out_specs.append(gradient[1])
        if not logits.bias.is_resident:
            # Blocks that are never visited keep the zeros that the output starts from.
            zeros = [jnp.zeros(gradient[0].shape, gradient[0].dtype)]
            leaves = len(jax.tree.leaves((arrays, more)))
            aliases = {len(steps.words) + leaves: 1}
    dq, *d_bias = pl.pallas_call(
        functools.partial(_row_kernel, logits, len(zeros)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps.words),
            grid=steps.grid,
            in_specs=[*specs, more_specs, *[pl.BlockSpec(memory_space=pl.ANY) for _ in zeros]],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((head_dim, bq), jnp.float32)],
        ),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=steps.compiler_params(),
        interpret=interpret,
        name="block_sparse_attention_dq",
    )(*steps.words, *arrays, more, *zeros)
    return logits.bias.finish(*d_bias, heads=q.shape[1]) if d_bias else None, dq.reshape(q.shape)


def _row_kernel(logits: Logits, unread: int, *refs: Any) -> None:
    words, refs = refs[: len(logits.steps.words)], refs[len(logits.steps.words) :]
    q, k, v, d_out, saved, turned, more = refs[:7]
    dq, *d_bias, sums = refs[7 + unread :]
    place = logits.steps.here(words)
    flags = place.flags

    if d_bias and logits.bias.is_resident:

        @pl.when(pl.program_id(1) == 0)
        def _():
            d_bias[0][...] = jnp.zeros_like(d_bias[0])

    @pl.when(flags & FIRST != 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        if d_bias and not logits.bias.is_resident:

            @pl.when(flags & ACTIVE == 0)
            def _():
                d_bias[0][...] = jnp.zeros_like(d_bias[0])

    def block(masked: bool) -> None:
        for keys in logits.chunks(CHUNK):
            x, slope = logits.tile(q[...], k[keys, :], more, place, keys, masked)
            p = jnp.exp2(x - saved[:1, :])
            ds = p * (dot(v[keys, :], d_out[...], NT) - saved[1:, :])
            if slope is not None:
                ds *= slope
            if d_bias:
                logits.bias.accumulate(d_bias[0], place, more["bias"], ds, keys)
            sums[...] += dot(turned[:, keys], ds.astype(k.dtype), NN)

    logits.steps.when_active(flags, block)

    @pl.when(flags & LAST != 0)
    def _():
        dq[...] = (sums[...] * logits.problem.scale).T.astype(dq.dtype)


def _by_col(problem, bias, q, k, v, saved, d_out, interpret) -> tuple[jax.Array, jax.Array]:
    steps = Steps.of(problem, "col", q, k)
    logits = Logits.of(problem, bias, steps)
    operands, _, cols = _operands(steps, problem, q, k, v, saved, d_out)
    (arrays, specs), (more, more_specs) = split(operands), split(logits.operands())
    shape, dtype = arrays[1].shape, k.dtype
    if steps.group > 1 and not steps.heads_inside:
        # Each query head has a list of its own: their sums meet afterwards, in float32.
        shape, dtype = (q.shape[0] * q.shape[1], *shape[1:]), jnp.float32
        cols = steps.spec((None, problem.block_kv, q.shape[-1]), lambda at: (at.head, at.col, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_col_kernel, logits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps.words),
            grid=steps.grid,
            in_specs=[*specs, more_specs],
            out_specs=[cols, cols],
            scratch_shapes=[pltpu.VMEM((problem.block_kv, q.shape[-1]), jnp.float32)] * 2,
        ),
        out_shape=[struct(shape, dtype, q, k, v, d_out)] * 2,
        compiler_params=steps.compiler_params(),
        interpret=interpret,
        name="block_sparse_attention_dkv",
    )(*steps.words, *arrays, more)
    if shape[0] > arrays[1].shape[0]:
        dk, dv = (x.reshape(arrays[1].shape[0], -1, *shape[1:]).sum(1) for x in (dk, dv))
    return dk.reshape(k.shape), dv.reshape(v.shape)


def _col_kernel(logits: Logits, *refs: Any) -> None:
    words, refs = refs[: len(logits.steps.words)], refs[len(logits.steps.words) :]
    q, k, v, d_out, saved, more, dk, dv, dk_sums, dv_sums = refs
    place = logits.steps.here(words)
    flags = place.flags

    @pl.when(logits.steps.at_first_head(flags & FIRST != 0))
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    def block(masked: bool) -> None:
        for keys in logits.chunks(min(CHUNK, max(64, dk.shape[0] // 2))):
            x, slope = logits.tile(q[...], k[keys, :], more, place, keys, masked)
            p = jnp.exp2(x - saved[:1, :])
            ds = p * (dot(v[keys, :], d_out[...], NT) - saved[1:, :])
            if slope is not None:
                ds *= slope
            dv_sums[keys, :] += dot(p.astype(d_out.dtype), d_out[...], NN)
            dk_sums[keys, :] += dot(ds.astype(q.dtype), q[...], NN)

    logits.steps.when_active(flags, block)

    @pl.when(logits.steps.at_last_head(flags & LAST != 0))
    def _():
        dk[...] = (dk_sums[...] * logits.problem.scale).astype(dk.dtype)
        dv[...] = dv_sums[...].astype(dv.dtype)
