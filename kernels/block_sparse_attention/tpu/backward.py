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
from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import struct, vary_like
from kernels.block_sparse_attention.problem import ACTIVE, FIRST, LAST, Problem
from kernels.block_sparse_attention.softmax import LOG2_E
from kernels.block_sparse_attention.tpu.logits import Logits, parts, split
from kernels.block_sparse_attention.tpu.parts import mapped
from kernels.block_sparse_attention.tpu.sharing import added_up, sharers
from kernels.block_sparse_attention.tpu.steps import NN, NT, Steps, dot

# Keys of a block that are computed at once. Two products more keep the columns' kernel from having
# registers for more than half a block of 256.
CHUNK = 256
# Of a masked block's rows, keys that are hidden and exponentiated at once: a whole tile and its
# mask do not fit the vector registers.
MASKED = 128


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
    with_bias_gradient: bool = True,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    """See kernels.block_sparse_attention.flash.Backend."""
    del out
    arrays = q, k, v, lse, delta, d_out.astype(q.dtype)
    function = functools.partial(_backward, interpret, with_bias_gradient)
    return mapped(function, problem, bias, *arrays, with_bias_gradient=with_bias_gradient)


def _backward(
    interpret: bool,
    with_bias_gradient: bool,
    problem: Problem,
    bias: Lowered,
    q,
    k,
    v,
    lse,
    delta,
    d_out,
) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
    rows = lse.shape[:2] + (-1, problem.block_q)
    # Two rows a block of queries, one copy: base-2 log-sum-exp and delta.
    saved = jnp.stack([(lse * LOG2_E).reshape(rows), delta.reshape(rows)], 3)
    arrays = q, k, v, saved, d_out
    d_bias, dq = _by_row(problem, bias, *arrays, interpret, with_bias_gradient)
    dk, dv = _by_col(problem, bias, *arrays, interpret)
    return d_bias, dq, dk, dv


def _operands(steps: Steps, problem: Problem, q, k, v, saved, d_out) -> tuple:
    """What both kernels read, and the specs of blocks of queries and of keys."""
    bq, bk, head_dim = problem.block_q, problem.block_kv, q.shape[-1]
    rows = steps.spec((None, bq, head_dim), lambda at: (at.head, at.row, 0))
    cols = steps.spec((None, bk, head_dim), lambda at: (at.kv_head, at.col, 0))
    pairs = steps.spec((None, None, 2, bq), lambda at: (at.head, at.row, 0, 0))
    q, k, v, d_out, saved = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, d_out, saved))
    return ((q, rows), (k, cols), (v, cols), (d_out, rows), (saved, pairs)), rows, cols


def _by_row(
    problem, bias, q, k, v, saved, d_out, interpret, with_bias_gradient
) -> tuple[Lowered, jax.Array]:
    arrays = q, k, v, saved, d_out
    call = functools.partial(_rows, interpret, with_bias_gradient, False)
    logits = Logits.of(problem, bias, Steps.of(problem, "row", q, k))
    gradient = logits.bias.gradient(logits.steps) if with_bias_gradient else None
    if gradient is None:
        return None, call(problem, bias, None, *arrays)[1]
    if logits.bias.is_resident:
        total, dq = call(problem, bias, None, *arrays)
    else:
        # Blocks that are never visited keep the zeros that the output starts from.
        zeros = vary_like(jnp.zeros(gradient[0].shape, gradient[0].dtype), arrays)
        if sharers(bias, *q.shape[:2]) == (1, 1):
            total, dq = call(problem, bias, zeros, *arrays)
        else:
            call = functools.partial(_rows, interpret, True, True)
            total, dq = added_up(call, problem, bias, zeros, *arrays)
    return logits.bias.finish(total, heads=q.shape[1]), dq


def _rows(
    interpret, with_bias_gradient, is_added, problem, bias, total, q, k, v, saved, d_out
) -> tuple[jax.Array | None, jax.Array]:
    """(gradient of the bias as its kernel lays it out, dq).

    Args:
      is_added: whether the gradient is added to what `total` holds in the blocks that are visited.
      total: what a gradient that is not resident starts from; it is overwritten.
    """
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
    aliases, totals, total_specs = {}, [], []
    if with_bias_gradient and (gradient := logits.bias.gradient(steps)) is not None:
        shapes.append(struct(gradient[0].shape, gradient[0].dtype, *inputs))
        out_specs.append(gradient[1])
        if total is not None:
            totals = [total]
            total_specs = [gradient[1] if is_added else pl.BlockSpec(memory_space=pl.ANY)]
            leaves = len(jax.tree.leaves((arrays, more)))
            aliases = {len(steps.words) + leaves: 1}
    dq, *d_bias = pl.pallas_call(
        functools.partial(_row_kernel, logits, len(totals), is_added),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps.words),
            grid=steps.grid,
            in_specs=[*specs, more_specs, *total_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((head_dim, bq), jnp.float32)],
        ),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=steps.compiler_params(),
        cost_estimate=cost.d_queries(problem, q, k, v),
        interpret=interpret,
        name="block_sparse_attention_dq",
    )(*steps.words, *arrays, more, *totals)
    return d_bias[0] if d_bias else None, dq.reshape(q.shape)


def _row_kernel(logits: Logits, num_totals: int, is_added: bool, *refs: Any) -> None:
    words, refs = refs[: len(logits.steps.words)], refs[len(logits.steps.words) :]
    q, k, v, d_out, saved, turned, more, *refs = refs
    before = refs[0] if is_added else None
    dq, *d_bias, sums = refs[num_totals:]
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
                d_bias[0][...] = before[...] if is_added else jnp.zeros_like(d_bias[0])

    def block(masked: bool) -> None:
        for keys in logits.chunks(CHUNK):
            x, slope = logits.tile(q[...], k[keys, :], more, place, keys)
            dp = dot(v[keys, :], d_out[...], NT)

            def gradient(some: slice, keys=keys, x=x, slope=slope, dp=dp) -> jax.Array:
                here = slice(some.start - keys.start, some.stop - keys.start)
                part = x[here]
                if masked:
                    part = logits.hidden(part, more, place, some, slice(0, q.shape[0]))
                ds = jnp.exp2(part - saved[:1, :]) * (dp[here] - saved[1:, :])
                return ds if slope is None else ds * slope[here]

            cuts = [gradient(some) for some in (parts(keys, MASKED) if masked else [keys])]
            if d_bias:
                ds = jnp.concatenate(cuts)
                logits.bias.accumulate(d_bias[0], place, more["bias"], ds, keys, before)
            ds = jnp.concatenate([cut.astype(k.dtype) for cut in cuts])
            sums[...] += dot(turned[:, keys], ds, NN)

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
        cost_estimate=cost.d_keys(problem, q, k, v),
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
            x, slope = logits.tile(q[...], k[keys, :], more, place, keys)
            if masked:
                x = logits.hidden(x, more, place, keys, slice(0, q.shape[0]))
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
