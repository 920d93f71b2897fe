"""Forward: one step an active block, softmax as it comes (Milakov and Gimelshein 2018).

Tiles lie with keys down the sublanes: maxima and sums over keys are then sums of whole vector
registers, where along the lanes each would cross them; running maxima and sums are rows of one
vector. Values come transposed, so that the output adds up transposed and is turned once a row.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bias import Lowered
from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import struct
from kernels.block_sparse_attention.problem import FIRST, LAST, Problem
from kernels.block_sparse_attention.softmax import LOWEST
from kernels.block_sparse_attention.tpu.logits import Logits, parts, split
from kernels.block_sparse_attention.tpu.parts import mapped
from kernels.block_sparse_attention.tpu.steps import NN, Steps, dot

# Keys of a block that are computed at once; and keys and queries of what is hidden, exponentiated
# and summed at once in a masked block: a whole tile and its mask do not fit the vector registers.
CHUNK, MASKED = 256, 128


def forward(
    problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See kernels.block_sparse_attention.flash.Backend."""
    return mapped(functools.partial(_forward, interpret), problem, bias, q, k, v)


def _forward(
    interpret: bool, problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    batch, heads, q_len, head_dim = q.shape
    bq, bk = problem.block_q, problem.block_kv
    steps = Steps.of(problem, "row", q, k)
    logits = Logits.of(problem, bias, steps)
    estimate = cost.forward(problem, q, k, v)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    v = v.reshape(v.shape[0], -1, bk, head_dim).swapaxes(2, 3)
    rows = steps.spec((None, bq, head_dim), lambda at: (at.head, at.row, 0))
    operands = (
        (q, rows),
        (k, steps.spec((None, bk, head_dim), lambda at: (at.kv_head, at.col, 0))),
        (v, steps.spec((None, None, head_dim, bk), lambda at: (at.kv_head, at.col, 0, 0))),
    )
    (arrays, specs), (more, more_specs) = split(operands), split(logits.operands())
    out, lse = pl.pallas_call(
        functools.partial(_kernel, logits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps.words),
            grid=steps.grid,
            in_specs=[*specs, more_specs],
            out_specs=[
                rows,
                steps.spec((None, None, 1, bq), lambda at: (at.head, at.row, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, bq), jnp.float32),
                pltpu.VMEM((1, bq), jnp.float32),
                pltpu.VMEM((head_dim, bq), jnp.float32),
            ],
        ),
        out_shape=[
            struct(q.shape, q.dtype, q, k, v),
            struct((batch * heads, q_len // bq, 1, bq), jnp.float32, q, k, v),
        ],
        compiler_params=steps.compiler_params(),
        cost_estimate=estimate,
        interpret=interpret,
        name="block_sparse_attention_forward",
    )(*steps.words, *arrays, more)
    return out.reshape(batch, heads, q_len, head_dim), lse.reshape(batch, heads, q_len)


def _kernel(logits: Logits, *refs: Any) -> None:
    words, refs = refs[: len(logits.steps.words)], refs[len(logits.steps.words) :]
    q, k, v, more, out, lse, peak, total, sums = refs
    place = logits.steps.here(words)
    flags = place.flags

    @pl.when(flags & FIRST != 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def block(masked: bool) -> None:
        all_queries = slice(0, logits.problem.block_q)
        for keys in logits.chunks(CHUNK):
            x, _ = logits.tile(q[...], k[keys, :], more, place, keys)
            if not masked:
                add(x, keys, all_queries)
                continue
            for queries in parts(all_queries, MASKED):
                for some in parts(keys, MASKED):
                    part = x[some.start - keys.start : some.stop - keys.start, queries]
                    add(logits.hidden(part, more, place, some, queries), some, queries)

    def add(x: jax.Array, keys: slice, queries: slice) -> None:
        before = peak[:, queries]
        now = jnp.maximum(before, x.max(0, keepdims=True))
        p = jnp.exp2(x - now)
        shrink = jnp.exp2(before - now)
        total[:, queries] = shrink * total[:, queries] + p.sum(0, keepdims=True)
        peak[:, queries] = now
        product = dot(v[:, keys], p.astype(v.dtype), NN)
        sums[:, queries] = shrink * sums[:, queries] + product

    logits.steps.when_active(flags, block)

    @pl.when(flags & LAST != 0)
    def _():
        seen = total[...] > 0
        divisor = jnp.where(seen, total[...], 1.0)
        out[...] = (sums[...] * (1 / divisor)).T.astype(out.dtype)
        natural = (peak[...] + jnp.log2(divisor)) * math.log(2)
        lse[...] = jnp.where(seen, natural, -jnp.inf)
