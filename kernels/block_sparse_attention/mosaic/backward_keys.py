"""dk and dv by columns of blocks, queries and their gradients streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

TILE = 64  # two float32 tiles are live at once, beside the sums


def dkv_kernel(
    problem: Problem, q: jax.Array, k: jax.Array, interpret: bool, wanted: Sequence[str]
) -> Callable[..., list[jax.Array]]:
    """Of the list by columns, q, k, v, d_out, lse in base 2, delta and the mask's operands.

    It gives those of "dk" and "dv" that are wanted, of each query head, [B, H, K, Dh]. Tiles are
    transposed: [keys, queries].
    """
    with_dk, with_dv = "dk" in wanted, "dv" in wanted
    batch, heads, _, head_dim = q.shape
    num_query, num_key = len(problem.query), len(problem.key)
    plan = Plan.make(
        problem.by_col.num_lines,
        problem.block_kv,
        problem.block_q,
        TILE,
        row=2 * head_dim * (1 + with_dk) + 4 * num_key,
        slot=4 * head_dim + 8 + 4 * num_query,
    )
    registers, units = Registers(interpret), Units(problem.scale, problem.soft_cap)
    shape = (WARPGROUP_ROWS, plan.tile)

    def kernel(*refs: Any) -> None:
        order, offsets, rows, flags, q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref, *rest = refs
        query_refs, key_refs = rest[:num_query], rest[num_query : num_query + num_key]
        *gradient_refs, scratch = rest[num_query + num_key :]
        b, h = lax.axis_index(BATCH), lax.axis_index(HEAD)
        warpgroup = lax.axis_index(WARPGROUP)
        lines = Lines(order, offsets, rows, flags, plan, b, h)

        @pl.when(warpgroup < plan.computing)
        def _compute() -> None:
            plan.take_registers()
            lane, member = plan.lane(warpgroup)
            first_row, entry, steps = lines.line(lane)
            kv_start = first_row + member * WARPGROUP_ROWS
            mine, ready = pl.ds(kv_start, WARPGROUP_ROWS), scratch["ready"].at[warpgroup]
            keys, *others = (ref.at[warpgroup] for ref in scratch["kv"])
            n = kv_head(h, heads // k.shape[1])
            for source, target in zip((k_ref, v_ref), (keys, *others), strict=False):
                plgpu.copy_gmem_to_smem(source.at[b, n, mine], target, ready)
            lines.copy_operands(key_refs, scratch["key"], warpgroup, mine, ready)
            plgpu.barrier_wait(ready)

            def body(step: jax.Array, totals: dict[str, jax.Array]) -> dict[str, jax.Array]:
                slot = plan.slot(lane, step)
                q_start, entry_flags = lines.tile(entry, step)
                queries, d_out = scratch["q"].at[slot], scratch["d_out"].at[slot]
                plgpu.barrier_wait(scratch["q_ready"].at[slot])
                [x] = registers.products((keys, queries))
                x = units.logits(x)
                slope = units.slope(x) if with_dk else None
                x = hide(
                    problem,
                    registers,
                    x,
                    entry_flags,
                    q_start,
                    kv_start,
                    [ref.at[slot] for ref in scratch["query"]],
                    [ref.at[warpgroup] for ref in scratch["key"]],
                    q_axis=1,
                )
                lse = registers.load(scratch["lse"].at[slot], 1)
                p = jnp.exp2(x * units.factor - registers.spread(lse, shape, 1))
                # The slope goes in early: its tile need not outlive the products.
                seen, p = p.astype(q.dtype), p if slope is None else p * slope
                plgpu.barrier_wait(scratch["d_ready"].at[slot])
                dp_of = [(values, d_out) for values in others]
                if with_dv:
                    dv, *dp = registers.accumulate(totals["dv"], seen, d_out, *dp_of)
                    totals |= {"dv": dv}
                else:
                    dp = registers.products(*dp_of)
                delta = registers.load(scratch["delta"].at[slot], 1)
                plgpu.barrier_arrive(scratch["d_free"].at[slot])
                if with_dk:
                    ds = (p * (dp[0] - registers.spread(delta, shape, 1))).astype(q.dtype)
                    [dk] = registers.accumulate(totals["dk"], ds, queries)
                    totals |= {"dk": dk}
                plgpu.barrier_arrive(scratch["q_free"].at[slot])
                return totals

            zeros = registers.full((WARPGROUP_ROWS, head_dim), 0)
            totals = lax.fori_loop(0, steps, body, dict.fromkeys(wanted, zeros))
            for name, target, buffer in zip(wanted, gradient_refs, (keys, *others), strict=False):
                total = totals[name] * problem.scale if name == "dk" else totals[name]
                buffer[...] = total.astype(k.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, target.at[b, h, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == plan.computing)
        def _feed() -> None:
            plan.give_registers()
            _, entries, steps = zip(*(lines.line(lane) for lane in range(plan.lanes)), strict=True)

            def copy(lane: int, step: jax.Array, slot: jax.Array, is_reused: jax.Array) -> None:
                q_start, _ = lines.tile(entries[lane], step)
                queries = pl.ds(q_start, plan.tile)

                def fetch(source: Any, name: str, ready: Any) -> None:
                    part = source.at[b, h, queries]
                    plgpu.copy_gmem_to_smem(part, scratch[name].at[slot], ready)

                wait_if(is_reused, scratch["d_free"].at[slot])
                fetch(d_ref, "d_out", scratch["d_ready"].at[slot])
                fetch(delta_ref, "delta", scratch["d_ready"].at[slot])
                wait_if(is_reused, scratch["q_free"].at[slot])
                ready = scratch["q_ready"].at[slot]
                fetch(q_ref, "q", ready)
                fetch(lse_ref, "lse", ready)
                lines.copy_operands(query_refs, scratch["query"], slot, queries, ready)

            plan.feed(steps, copy, (scratch["q_free"], scratch["d_free"]))

    gradient = jax.ShapeDtypeStruct((batch, heads, *k.shape[2:]), k.dtype)
    return plan.launch(
        kernel,
        problem.by_col.num_lines,
        batch,
        heads,
        interpret=interpret,
        out_type=[gradient] * len(wanted),
        scratch_types=[
            {
                "kv": [plan.resident(head_dim, k.dtype)] * (1 + with_dk),
                "q": plan.streamed(head_dim, q.dtype),
                "d_out": plan.streamed(head_dim, q.dtype),
                "lse": plan.streamed_vector(jnp.float32),
                "delta": plan.streamed_vector(jnp.float32),
                "query": [plan.streamed_vector(jnp.int32)] * num_query,
                "key": [plan.resident_vector(jnp.int32)] * num_key,
                "ready": plgpu.Barrier(
                    num_arrivals=1 + with_dk + num_key, num_barriers=plan.computing
                ),
                "q_ready": plgpu.Barrier(num_arrivals=2 + num_query, num_barriers=plan.ring),
                "d_ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.ring),
                "q_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.ring),
                "d_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.ring),
            }
        ],
    )
