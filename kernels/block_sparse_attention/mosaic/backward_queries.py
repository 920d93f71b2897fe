"""dq by rows of blocks, keys and values streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention.mosaic import copies
from kernels.block_sparse_attention.mosaic.lines import WARPGROUP, Lines, Plan, kv_head
from kernels.block_sparse_attention.mosaic.tiles import WARPGROUP_ROWS, Registers, Units, hide
from kernels.block_sparse_attention.problem import Problem

TILE = 64  # two float32 tiles are live at once, beside the sum


def dq_kernel(
    problem: Problem, q: jax.Array, k: jax.Array, interpret: Any
) -> Callable[..., jax.Array]:
    """Of the list by rows, q, k, v, d_out, lse in base 2, delta and the mask's operands."""
    batch, heads, _, head_dim = q.shape
    num_query, num_key = len(problem.query), len(problem.key)
    plan = Plan.make(
        problem.by_row.num_lines,
        problem.block_q,
        problem.block_kv,
        TILE,
        row=4 * head_dim + 8 + 4 * num_query,
        slot=4 * head_dim + 4 * num_key,
    )
    registers, units = Registers(interpret), Units(problem.scale, problem.soft_cap)
    shape = (WARPGROUP_ROWS, plan.tile)

    def kernel(*refs: Any) -> None:
        lists, inputs, rest = refs[:4], refs[4:10], refs[10:]
        q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref = inputs
        query_refs, key_refs = rest[:num_query], rest[num_query : num_query + num_key]
        dq_ref, scratch = rest[num_query + num_key :]
        warpgroup, lines = lax.axis_index(WARPGROUP), Lines.here(plan, *lists)
        b, h = lines.batch, lines.head

        @pl.when(warpgroup < plan.computing)
        def _compute() -> None:
            plan.take_registers()
            lane, member = plan.lane(warpgroup)
            first_row, entry, steps = lines.line(lane)
            q_start = first_row + member * WARPGROUP_ROWS
            mine, ready = pl.ds(q_start, WARPGROUP_ROWS), scratch["ready"].at[warpgroup]
            own = {name: scratch[name].at[warpgroup] for name in ("q", "d_out", "lse", "delta")}
            sources = zip((q_ref, d_ref, lse_ref, delta_ref), own, strict=True)
            rows = [(source, (b, h), scratch[name]) for source, name in sources]
            operands = copies.operands(lines, query_refs, scratch["query"])
            copies.start([*rows, *operands], mine, warpgroup, ready)
            plgpu.barrier_wait(ready)
            lse, delta = registers.load(own["lse"], 0), registers.load(own["delta"], 0)

            def body(step: jax.Array, total: jax.Array) -> jax.Array:
                slot = plan.slot(lane, step)
                kv_start, entry_flags = lines.tile(entry, step)
                keys, values = scratch["k"].at[slot], scratch["v"].at[slot]
                plgpu.barrier_wait(scratch["v_ready"].at[slot])
                plgpu.barrier_wait(scratch["k_ready"].at[slot])
                x, dp = registers.products((own["q"], keys), (own["d_out"], values))
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                x = units.logits(x)
                slope = units.slope(x)
                x = hide(
                    problem,
                    registers,
                    x,
                    entry_flags,
                    q_start,
                    kv_start,
                    [ref.at[warpgroup] for ref in scratch["query"]],
                    [ref.at[slot] for ref in scratch["key"]],
                    q_axis=0,
                )
                p = jnp.exp2(x * units.factor - registers.spread(lse, shape, 0))
                ds = p * (dp - registers.spread(delta, shape, 0))
                ds = ds if slope is None else ds * slope
                [total] = registers.accumulate(total, ds.astype(q.dtype), keys)
                plgpu.barrier_arrive(scratch["k_free"].at[slot])
                return total

            zeros = registers.full((WARPGROUP_ROWS, head_dim), 0)
            total = lax.fori_loop(0, steps, body, zeros)
            own["q"][...] = (total * problem.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own["q"], dq_ref.at[b, h, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == plan.computing)
        def _feed() -> None:
            n = kv_head(h, heads // k.shape[1])
            operands = copies.operands(lines, key_refs, scratch["key"])
            keys, values = (k_ref, (b, n), scratch["k"]), (v_ref, (b, n), scratch["v"])
            copies.feed(lines, scratch, {"v": [values], "k": [keys, *operands]})

    return plan.launch(
        kernel,
        problem.by_row.num_lines,
        batch,
        heads,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            {
                "q": plan.resident(head_dim, q.dtype),
                "d_out": plan.resident(head_dim, q.dtype),
                "lse": plan.resident_vector(jnp.float32),
                "delta": plan.resident_vector(jnp.float32),
                "k": plan.streamed(head_dim, k.dtype),
                "v": plan.streamed(head_dim, k.dtype),
                "query": [plan.resident_vector(jnp.int32)] * num_query,
                "key": [plan.streamed_vector(jnp.int32)] * num_key,
                "ready": plgpu.Barrier(num_arrivals=4 + num_query, num_barriers=plan.computing),
                **plan.rings(k=1 + num_key, v=1),
            }
        ],
    )
