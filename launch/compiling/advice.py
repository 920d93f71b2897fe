"""What is large, and which setting would make a run fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.compiling import memory, program as program_lib
from launch.compiling.chips import GIB, Chip
from launch.compiling.program import Plan
from launch.compiling.report import WIDTH, size, table
from launch.compiling.topology import Topology
from launch.run_config import RunConfig
from t5like.errors import UserError
from t5like.training.sharding import Sharding

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
# How many times the gradients count beside the state: as float32, until the update has used them.
_GRADIENT = 4


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of the configuration.

    Attributes:
      settings: what to pass on the command line.
      config: the run with it.
      needed: bytes of a device, estimated.
    """

    settings: str
    config: RunConfig
    needed: float


def advise(
    plan: Plan, topology: Topology, chip: Chip, tight: Mapping[str, Any], tries: int
) -> dict[str, Any]:
    """The advice as JSON values, with "lines" to print and a "summary" of one line.

    Args:
      tight: the record of the program that does not fit.
      tries: most changes that are tried by compiling.
    """
    needed = tight["memory"]["peak"] if "memory" in tight else _needed(plan, tight["refusal"])
    hbm = chip.hbm
    tensors = memory.by_bytes(memory.state_tensors(plan.state), 8)
    seen = tight.get("activations") or ()
    changes = sorted(_changes(plan, needed), key=lambda change: change.needed > hbm)
    tried = []
    for change in changes[:tries]:
        tried.append(_try(change, plan, topology, hbm))
    found = next((text for text, fits in tried if fits), None)
    likely = next((c for c in changes if c.needed <= hbm), None)
    lines = [f"{tight['name']} does not fit: it needs {size(needed)} of {size(hbm)} on each device"]
    lines += _listed("largest of the state", [(t.name, t.shape, t.bytes) for t in tensors])
    activations = [(t["name"], t["shape"], t["bytes"]) for t in seen[:8]]
    lines += _listed("largest that the program makes", activations)
    lines.append("  what would change it, a device:")
    for change in changes:
        verdict = "would fit" if change.needed <= hbm else "would not fit"
        about = f"    {change.settings}: about {size(change.needed)}, {verdict} (estimated)"
        lines.append(about)
    lines += [f"    {text}" for text, _ in tried]
    mend = found or (likely and f"{likely.settings} should fit (estimated)")
    mend = mend or "take more chips, or chips with more memory"
    return {
        "needed": needed,
        "available": hbm,
        "state": [dataclasses.asdict(tensor) for tensor in tensors],
        "estimated": [{"settings": c.settings, "needed": c.needed} for c in changes],
        "tried": [{"result": text, "fits": fits} for text, fits in tried],
        "lines": lines,
        "summary": (
            f"{tight['name']} needs {size(needed)} a device and {chip.name} has {size(hbm)}: {mend}"
        ),
    }


def _listed(title: str, rows: Sequence[tuple[str, str, float]]) -> Iterator[str]:
    if rows:
        yield f"  {title}:"
        cells = [(size(count), shape, name) for name, shape, count in rows]
        yield from list(table(("bytes", "on a device", "what"), cells, indent=4))[1:]


def _needed(plan: Plan, refusal: str) -> float:
    """Bytes that a program needs, from the compiler's refusal.

    It says either what the whole program uses or what its temporaries do, beside which the state
    and the batch lie.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", refusal)
    if used:
        return float(used[1]) * _UNITS[used[2]]
    temporaries = re.search(r"\(([\d.]+)([KMGT]?)i?B?\) exceeds", refusal)
    state = sum(memory.parts_of(plan.state).values())
    if temporaries:
        return state + float(temporaries[1]) * _UNITS[temporaries[2]]
    asked = re.search(r"([\d.]+)\s*([KMGT]?)i?B", refusal)
    return state + (float(asked[1]) * _UNITS[asked[2]] if asked else 0.0)


# --- changes -----------------------------------------------------------------------------------


def _changes(plan: Plan, needed: float) -> Iterator[Change]:
    """Changes worth a thought, each with an estimate, those that cost the least speed first.

    The state and its gradients are counted exactly; of the rest, half as many rows at a time are
    taken to need half, and full recomputation a share of one layer's in a stack.
    """
    config = plan.config
    fixed = _fixed(plan)
    rest = max(0.0, needed - fixed)
    depth = max(config.model.stacks.values())
    if config.model.remat not in ("full",):
        model = dataclasses.replace(config.model, remat="full")
        kept = 1 / depth + 0.05
        yield Change(
            "--gin.ModelConfig.remat=\"'full'\"",
            dataclasses.replace(config, model=model),
            fixed + rest * kept,
        )
    parts = config.sharding.batch_parts(plan.mesh)
    for more in (2, 4, 8):
        times = config.accumulate * more
        if config.batch_size % (times * parts) == 0:
            yield Change(
                f"--gin.train.accumulate={times}",
                dataclasses.replace(config, accumulate=times),
                # Gradients are added up in float32 beside those of the micro-batch.
                fixed + _gradients(plan) + rest / more,
            )
    yield from _layouts(plan, rest)


def _layouts(plan: Plan, rest: float) -> Iterator[Change]:
    """Other meshes of the same devices: all of them fsdp, or some of them tensor."""
    config, mesh = plan.config, plan.mesh.shape
    fixed_axes = dict(replica=mesh["replica"], sequence=mesh["sequence"])
    within = plan.mesh.size // (mesh["replica"] * mesh["sequence"])
    options = [dict(fsdp=within // t, tensor=t) for t in (1, 2, 4, 8) if within % t == 0]
    for sizes in options:
        if (sizes["fsdp"], sizes["tensor"]) == (mesh["fsdp"], mesh["tensor"]):
            continue
        sharding = Sharding(data=1, rules=config.sharding.rules, **fixed_axes, **sizes)
        changed = dataclasses.replace(config, sharding=sharding)
        try:
            other = program_lib.plan(changed, list(plan.mesh.devices.flat))
        except UserError:
            continue
        rows = sharding.batch_parts(other.mesh) / config.sharding.batch_parts(plan.mesh)
        yield Change(
            f"--gin.Sharding.data=1 --gin.Sharding.fsdp={sizes['fsdp']} "
            f"--gin.Sharding.tensor={sizes['tensor']}",
            changed,
            _fixed(other) + rest / rows / sizes["tensor"] * mesh["tensor"],
        )


def _fixed(plan: Plan) -> float:
    return sum(memory.parts_of(plan.state).values()) + _gradients(plan)


def _gradients(plan: Plan) -> float:
    parameters = memory.parts_of(plan.state)["parameters"]
    return parameters * _GRADIENT / 4


def _try(change: Change, plan: Plan, topology: Topology, hbm: float) -> tuple[str, bool]:
    """(what came of compiling a change, whether it fits)."""
    try:
        changed = program_lib.plan(change.config, list(plan.mesh.devices.flat))
    except UserError as error:
        return f"{change.settings}: {error}", False
    for made in program_lib.train_programs(changed):
        if made.compiled is None:
            line = made.refusal.splitlines()[0]
            return f"{change.settings} does not fit (compiled): {line}"[: 4 * WIDTH], False
        peak = memory.of(made.compiled).peak
        if peak > hbm:
            return f"{change.settings} does not fit (compiled): {size(peak)}", False
    return f"{change.settings} fits (compiled): {size(peak)}", True
