"""A compiled program as numbers: the record that is printed and saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from launch.compiling import chips, counts as counts_lib, floor, hlo, memory, roofline
from launch.compiling.collectives import Collective
from launch.compiling.counts import Counts
from launch.compiling.program import Plan, Program
from launch.compiling.topology import Topology


def run(plan: Plan, topology: Topology, chip: chips.Chip | None) -> dict[str, Any]:
    """What is the same for all programs of a run, as JSON values; bytes are a device's."""
    leaves = jax.tree.leaves(plan.state.params)
    return {
        "topology": topology.name,
        "chips": topology.chips if topology.chip and topology.shape else None,
        "devices": plan.mesh.size,
        "device_kind": plan.mesh.devices.flat[0].device_kind,
        "hbm": chip.hbm if chip else None,
        "mesh": dict(plan.mesh.shape),
        "architecture": plan.data.model.architecture,
        "parameters": sum(leaf.size for leaf in leaves),
        "state": memory.parts_of(plan.state),
        "batch_size": plan.config.batch_size,
        "accumulate": plan.config.accumulate,
        "remat": plan.data.model.remat,
        "jax": jax.__version__,
    }


def program(
    plan: Plan, made: Program, topology: Topology, chip: chips.Chip | None
) -> dict[str, Any]:
    """One program as JSON values: bytes, FLOPs and seconds of one device and one call."""
    record = {
        "name": made.name,
        "batch": {name: list(shape) for name, shape in made.batch.items()},
        "seconds": {"trace": made.seconds[0], "compile": made.seconds[1]},
        "fits": made.compiled is not None,
        "refusal": made.refusal,
    }
    if made.compiled is None:
        return record
    module = hlo.parse(made.compiled.as_text())
    mesh = dict(plan.mesh.shape)
    counts = counts_lib.count(module, mesh, unknown_trips=made.trips)
    used = memory.of(made.compiled)
    # What a loop of unknown length does is not known either.
    is_known = not counts.unknown_loops
    record |= {
        "fits": chip is None or used.peak <= chip.hbm,
        "memory": dataclasses.asdict(used),
        "activations": [dataclasses.asdict(t) for t in memory.largest_activations(module)],
        "flops": flops(counts, made, plan.mesh.size),
        "bytes": counts.bytes,
        "collectives": grouped(counts.collectives),
        "wire": counts.wire,
        "unknown_loops": {"count": counts.unknown_loops, "trips": made.trips},
        "loops": {name: {"trips": n, "known": known} for name, (n, known) in counts.loops.items()},
    }
    if made.name.startswith("train"):
        track = made.name.partition("/")[2] or next(iter(plan.tracks))
        least = floor.of(plan, track)
        record["floor"] = dataclasses.asdict(least) | {
            "total": least.total,
            "ratio": counts.wire / least.total if least.total and is_known else None,
        }
    if chip is not None:
        model_flops = made.model_flops if is_known else math.nan
        found = roofline.estimate(counts, chip, topology, plan.mesh, model_flops)
        record["roofline"] = dataclasses.asdict(found) if found else None
    return record


def flops(counts: Counts, made: Program, devices: int) -> dict[str, Any]:
    """FLOPs of a device: the model's, those compiled, and of these each stage's."""
    stages: dict[str, float] = {}
    for operation in counts.operations:
        for source, value in operation.products:
            stage = memory.stage_of(source)
            stages[stage] = stages.get(stage, 0.0) + value * operation.times
    model = None if math.isnan(made.model_flops) else made.model_flops / devices
    return {
        "model": model,
        "compiled": counts.flops,
        "ratio": counts.flops / model if model and not counts.unknown_loops else None,
        "stages": stages,
        "kernels": sum(op.flops * op.times for op in counts.operations if op.is_kernel),
        "opaque_kernels": sorted(counts.opaque),
    }


def grouped(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind, shape and axes together, most bytes first."""
    groups: dict[tuple, dict[str, Any]] = {}
    for collective in found:
        shapes = ", ".join(map(str, collective.arrays[:3]))
        more = len(collective.arrays) - 3
        shapes += f", {more} more" if more > 0 else ""
        key = collective.kind, shapes, collective.axes
        group = groups.setdefault(
            key,
            {
                "kind": collective.kind,
                "shape": shapes,
                "axes": list(collective.axes),
                "group": collective.group,
                "payload": collective.payload,
                "times": 0.0,
                "bytes": 0.0,
                "asynchronous_bytes": 0.0,
                "source": memory.short(collective.source),
            },
        )
        group["times"] += collective.times
        group["bytes"] += collective.total
        group["asynchronous_bytes"] += collective.total if collective.asynchronous else 0.0
    return sorted(groups.values(), key=lambda group: -group["bytes"])
