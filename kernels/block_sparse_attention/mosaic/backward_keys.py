"""dk and dv by columns of blocks, queries and their gradients streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

TILE = 64  # two float32 tiles are live at once, beside the sums


def dkv_kernel(
    problem: Problem, q: jax.Array, k: jax.Array, interpret: Any, wanted: Sequence[str]
) -> Callable[..., list[jax.Array]]:
    """Of the list by columns, q, k, v, d_out, lse in base 2, delta and the mask's operands.

    It gives those of "dk" and "dv" that are wanted, of each query head, [B, H, K, Dh]: in float32
    where heads share keys, else in their dtype. Tiles are transposed: [keys, queries].
    """
    batch, heads, _, head_dim = q.shape
    shares = heads > k.shape[1]
    with_dk, with_dv = "dk" in wanted, "dv" in wanted
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
        lists, inputs, rest = refs[:4], refs[4:10], refs[10:]
        q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref = inputs
        query_refs, key_refs = rest[:num_query], rest[num_query : num_query + num_key]
        *gradient_refs, scratch = rest[num_query + num_key :]
        warpgroup, lines = lax.axis_index(WARPGROUP), Lines.here(plan, *lists)
        b, h = lines.batch, lines.head

        @pl.when(warpgroup < plan.computing)
        def _compute() -> None:
            plan.take_registers()
            lane, member = plan.lane(warpgroup)
            first_row, entry, steps = lines.line(lane)
            kv_start = first_row + member * WARPGROUP_ROWS
            mine, ready = pl.ds(kv_start, WARPGROUP_ROWS), scratch["ready"].at[warpgroup]
            keys, *others = (ref.at[warpgroup] for ref in scratch["kv"])
            n = kv_head(h, heads // k.shape[1])
            sources = zip((k_ref, v_ref), scratch["kv"], strict=False)
            rows = [(source, (b, n), target) for source, target in sources]
            operands = copies.operands(lines, key_refs, scratch["key"])
            copies.start([*rows, *operands], mine, warpgroup, ready)
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
                if shares:
                    # Straight from registers: no buffer holds float32, and threads write sectors.
                    target[b, h, mine] = total
                else:
                    buffer[...] = total.astype(k.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, target.at[b, h, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == plan.computing)
        def _feed() -> None:
            operands = copies.operands(lines, query_refs, scratch["query"])
            d_out, delta = (d_ref, (b, h), scratch["d_out"]), (delta_ref, (b, h), scratch["delta"])
            queries, lse = (q_ref, (b, h), scratch["q"]), (lse_ref, (b, h), scratch["lse"])
            streams = {"d": [d_out, delta], "q": [queries, lse, *operands]}
            copies.feed(lines, scratch, streams)

    dtype = jnp.float32 if shares else k.dtype
    gradient = jax.ShapeDtypeStruct((batch, heads, *k.shape[2:]), dtype)
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
                **plan.rings(q=2 + num_query, d=2),
            }
        ],
    )
