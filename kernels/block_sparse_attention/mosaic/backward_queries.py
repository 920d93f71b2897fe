"""dq by rows of blocks, keys and values streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention.mosaic.lines import (
    BATCH,
    HEAD,
    WARPGROUP,
    Lines,
    Plan,
    kv_head,
    wait_if,
)
from kernels.block_sparse_attention.mosaic.tiles import WARPGROUP_ROWS, Registers, Units, hide
from kernels.block_sparse_attention.problem import Problem

TILE = 64  # two float32 tiles are live at once, beside the sum


def dq_kernel(
    problem: Problem, q: jax.Array, k: jax.Array, interpret: bool
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
        order, offsets, cols, flags, q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, *rest = refs
        query_refs, key_refs = rest[:num_query], rest[num_query : num_query + num_key]
        dq_ref, scratch = rest[num_query + num_key :]
        b, h = lax.axis_index(BATCH), lax.axis_index(HEAD)
        warpgroup = lax.axis_index(WARPGROUP)
        lines = Lines(order, offsets, cols, flags, plan, b, h)

        @pl.when(warpgroup < plan.computing)
        def _compute() -> None:
            plan.take_registers()
            lane, member = plan.lane(warpgroup)
            first_row, entry, steps = lines.line(lane)
            q_start = first_row + member * WARPGROUP_ROWS
            mine, ready = pl.ds(q_start, WARPGROUP_ROWS), scratch["ready"].at[warpgroup]
            own = {name: scratch[name].at[warpgroup] for name in ("q", "d_out", "lse", "delta")}
            for source, target in zip(
                (q_ref, d_ref, lse_ref, delta_ref), own.values(), strict=True
            ):
                plgpu.copy_gmem_to_smem(source.at[b, h, mine], target, ready)
            lines.copy_operands(query_refs, scratch["query"], warpgroup, mine, ready)
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
            plan.give_registers()
            n = kv_head(h, heads // k.shape[1])
            _, entries, steps = zip(*(lines.line(lane) for lane in range(plan.lanes)), strict=True)

            def copy(lane: int, step: jax.Array, slot: jax.Array, is_reused: jax.Array) -> None:
                kv_start, _ = lines.tile(entries[lane], step)
                keys = pl.ds(kv_start, plan.tile)
                wait_if(is_reused, scratch["v_free"].at[slot])
                ready = scratch["v_ready"].at[slot]
                plgpu.copy_gmem_to_smem(v_ref.at[b, n, keys], scratch["v"].at[slot], ready)
                wait_if(is_reused, scratch["k_free"].at[slot])
                ready = scratch["k_ready"].at[slot]
                plgpu.copy_gmem_to_smem(k_ref.at[b, n, keys], scratch["k"].at[slot], ready)
                lines.copy_operands(key_refs, scratch["key"], slot, keys, ready)

            plan.feed(steps, copy, (scratch["k_free"], scratch["v_free"]))

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
                "k_ready": plgpu.Barrier(num_arrivals=1 + num_key, num_barriers=plan.ring),
                "v_ready": plgpu.Barrier(num_barriers=plan.ring),
                "k_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.ring),
                "v_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.ring),
            }
        ],
    )
