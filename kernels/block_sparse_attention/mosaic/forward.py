"""Forward: out and log-sum-exp by rows of blocks, keys and values streamed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import vary_like
from kernels.block_sparse_attention.mosaic import copies
from kernels.block_sparse_attention.mosaic.lines import WARPGROUP, Lines, Plan, kv_head
from kernels.block_sparse_attention.mosaic.tiles import (
    WARPGROUP_ROWS,
    Registers,
    Units,
    hide,
)
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOG2_E, LOWEST


def forward(
    problem: Problem, bias: None, q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention over the active blocks.

    Args:
      bias: None.
      q: [B, H, Q, Dh]; k, v: [B, N, K, Dh], bfloat16 or float16.
      interpret: parameters of Pallas' interpreter of Mosaic GPU, to run in it.

    Returns:
      out [B, H, Q, Dh] of q's dtype, and the logarithm of the softmax's denominator, float32
      [B, H, Q], -inf where nothing is seen.
    """
    del bias
    batch, heads, _, head_dim = q.shape
    num_query, num_key = len(problem.query), len(problem.key)
    plan = Plan.make(
        problem.by_row.num_lines,
        problem.block_q,
        problem.block_kv,
        128 if head_dim <= 128 else 64,
        row=2 * head_dim + 4 + 4 * num_query,
        slot=4 * head_dim + 4 * num_key,
    )
    registers, units = Registers(interpret), Units(problem.scale, problem.soft_cap)
    shape = (WARPGROUP_ROWS, plan.tile)

    def kernel(*refs: Any) -> None:
        lists, (q_ref, k_ref, v_ref), rest = refs[:4], refs[4:7], refs[7:]
        query_refs, key_refs = rest[:num_query], rest[num_query : num_query + num_key]
        out_ref, lse_ref, scratch = rest[num_query + num_key :]
        warpgroup, lines = lax.axis_index(WARPGROUP), Lines.here(plan, *lists)
        b, h = lines.batch, lines.head

        def meet() -> None:
            """Two warpgroups of a line take turns with the tensor core, one's softmax being
            computed during the other's products."""
            if plan.warpgroups == 2:
                plgpu.barrier_arrive(scratch["turn"])
                plgpu.barrier_wait(scratch["turn"])

        @pl.when(warpgroup < plan.computing)
        def _compute() -> None:
            plan.take_registers()
            lane, member = plan.lane(warpgroup)
            first_row, entry, steps = lines.line(lane)
            q_start = first_row + member * WARPGROUP_ROWS
            mine, q_tile = pl.ds(q_start, WARPGROUP_ROWS), scratch["q"].at[warpgroup]
            ready = scratch["q_ready"].at[warpgroup]
            rows = (q_ref, (b, h), scratch["q"])
            operands = copies.operands(lines, query_refs, scratch["query"])
            copies.start([rows, *operands], mine, warpgroup, ready)
            plgpu.barrier_wait(ready)
            copies.wait_if(steps > 0, scratch["k_ready"].at[plan.slot(lane, jnp.int32(0))])
            if plan.warpgroups == 2:
                pl.when(member == 1)(meet)

            def body(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                total, highest, weight = carry
                slot = plan.slot(lane, step)
                kv_start, entry_flags = lines.tile(entry, step)
                [x] = registers.products((q_tile, scratch["k"].at[slot]), during=meet)
                if not num_key:
                    plgpu.barrier_arrive(scratch["k_free"].at[slot])
                x = hide(
                    problem,
                    registers,
                    units.logits(x),
                    entry_flags,
                    q_start,
                    kv_start,
                    [ref.at[warpgroup] for ref in scratch["query"]],
                    [ref.at[slot] for ref in scratch["key"]],
                    q_axis=0,
                )
                if num_key:
                    plgpu.barrier_arrive(scratch["k_free"].at[slot])

                now = jnp.maximum(highest, x.max(axis=1) * units.factor)
                shrink = jnp.exp2(highest - now)
                p = jnp.exp2(x * units.factor - registers.spread(now, shape, 0))
                total *= registers.spread(shrink, total.shape, 0)
                weight = weight * shrink + p.sum(axis=1)
                p = p.astype(q.dtype)
                if plan.warpgroups == 2:
                    # The softmax is to be done before the other warpgroup's turn ends.
                    total, weight, now, p = lax.optimization_barrier((total, weight, now, p))
                    plgpu.barrier_arrive(scratch["turn"])
                plgpu.barrier_wait(scratch["v_ready"].at[slot])
                if plan.warpgroups == 2:
                    plgpu.barrier_wait(scratch["turn"])

                def await_next() -> None:
                    following = scratch["k_ready"].at[plan.slot(lane, step + 1)]
                    copies.wait_if(step + 1 < steps, following)

                values = scratch["v"].at[slot]
                [total] = registers.accumulate(total, p, values, during=await_next)
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                return total, now, weight

            total, highest, weight = lax.fori_loop(
                0,
                steps,
                body,
                (
                    registers.full((WARPGROUP_ROWS, head_dim), 0),
                    registers.full((WARPGROUP_ROWS,), LOWEST),
                    registers.full((WARPGROUP_ROWS,), 0),
                ),
            )
            if plan.warpgroups == 2:
                pl.when(member == 0)(meet)

            inverse = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
            q_tile[...] = (total * registers.spread(inverse, total.shape, 0)).astype(q.dtype)
            lse = scratch["lse"].at[warpgroup]
            lse[...] = highest * (1 / LOG2_E) + jnp.log(weight)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[b, h, mine])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, h, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == plan.computing)
        def _feed() -> None:
            n = kv_head(h, heads // k.shape[1])
            operands = copies.operands(lines, key_refs, scratch["key"])
            keys, values = (k_ref, (b, n), scratch["k"]), (v_ref, (b, n), scratch["v"])
            copies.feed(lines, scratch, {"k": [keys, *operands], "v": [values]})

    call = plan.launch(
        kernel,
        problem.by_row.num_lines,
        batch,
        heads,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        scratch_types=[
            {
                "q": plan.resident(head_dim, q.dtype),
                "k": plan.streamed(head_dim, k.dtype),
                "v": plan.streamed(head_dim, v.dtype),
                "lse": plan.resident_vector(jnp.float32),
                "query": [plan.resident_vector(jnp.int32)] * num_query,
                "key": [plan.streamed_vector(jnp.int32)] * num_key,
                "q_ready": plgpu.Barrier(num_arrivals=1 + num_query, num_barriers=plan.computing),
                **plan.rings(k=1 + num_key, v=1),
                "turn": plgpu.Barrier(num_arrivals=plan.warpgroups),
            }
        ],
    )
    operands = [jnp.asarray(x) for x in (*problem.query, *problem.key)]
    lists = Lines.arrays(problem.by_row, by_row=True)
    call = cost.told(call, cost.forward(problem, q, k, v))
    out, lse = call(*lists, q, k, v, *operands)
    return vary_like((out, lse), q, k, v)
