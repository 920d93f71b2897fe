"""Copies to shared memory: rows that a warpgroup keeps, and tiles that stream through rings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention.mosaic.lines import Lines

# An array in global memory, its leading indices, and its place in shared memory.
Part = tuple[Any, tuple[Any, ...], Any]


def operands(lines: Lines, sources: Sequence[Any], targets: Sequence[Any]) -> list[Part]:
    """Of the mask, for the program's row of the batch and head."""
    pairs = zip(sources, targets, strict=True)
    return [(source, lines.group(source), target) for source, target in pairs]


def start(parts: Sequence[Part], slots: pl.Slice, place: jax.Array, barrier: Any) -> None:
    """Starts copies of `slots` to `place` in shared memory; the barrier counts one arrival each."""
    for source, lead, target in parts:
        plgpu.copy_gmem_to_smem(source.at[*lead, slots], target.at[place], barrier)


def feed(lines: Lines, scratch: Mapping[str, Any], streams: Mapping[str, Sequence[Part]]) -> None:
    """The feeding warpgroup's work.

    Args:
      streams: by name, what is copied and freed together; the first is freed first. A name's
        barriers are scratch[name + "_ready"] and scratch[name + "_free"].
    """
    plan = lines.plan
    plan.give_registers()
    _, entries, steps = zip(*(lines.line(lane) for lane in range(plan.lanes)), strict=True)

    def copy(lane: int, step: jax.Array, slot: jax.Array, is_reused: jax.Array) -> None:
        first, _ = lines.tile(entries[lane], step)
        for name, parts in streams.items():
            wait_if(is_reused, scratch[name + "_free"].at[slot])
            ready = scratch[name + "_ready"].at[slot]
            start(parts, pl.ds(first, plan.tile), slot, ready)

    plan.feed(steps, copy, [scratch[name + "_free"] for name in streams])


def wait_if(condition: jax.Array, barrier: Any) -> None:
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))
