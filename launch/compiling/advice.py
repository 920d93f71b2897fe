"""What is large, and which setting would make a run fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from launch.compiling import chips, measure, memory, program as program_lib, topology
from launch.compiling.chips import GIB, Chip
from launch.compiling.program import Plan
from launch.compiling.report import size, table
from launch.run_config import RunConfig
from t5like.errors import UserError
from t5like.training.sharding import Sharding

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed configuration.

    Attributes:
      settings: what to pass on the command line.
      config: the run with it.
      needed: bytes of a device, estimated.
    """

    settings: str
    config: RunConfig
    needed: float


def advise(plan: Plan, chip: Chip, tight: Mapping[str, Any], tries: int) -> dict[str, Any]:
    """The advice as JSON values, with "lines" to print and a "summary" of one line.

    Args:
      tight: the record of the program that does not fit.
      tries: most changes that are tried by compiling.
    """
    hbm, seen, place = chip.hbm, tight, chip.name
    if "memory" not in tight and tries and tight["name"] != "generate":
        larger = _on_a_larger_chip(plan, chip, tight["name"])
        seen, place = larger or (tight, place)
    needed = seen["memory"]["peak"] if "memory" in seen else _needed(plan, tight["refusal"])
    tensors = sorted(memory.state_tensors(plan.state), key=lambda t: -t.bytes)[:8]
    changes = list(_changes(plan, needed, hbm))
    # Those that should fit first; of the rest, the nearest.
    likely = [change for change in changes if change.needed <= hbm]
    order = likely + sorted((c for c in changes if c.needed > hbm), key=lambda c: c.needed)
    tried = []
    for change in order[:tries]:
        tried.append(_try(change, plan, hbm))
        if tried[-1][1]:
            break
    lines = [f"{tight['name']} does not fit: it needs {size(needed)} of {size(hbm)} on each device"]
    lines += _listed("largest of the state", [(t.name, t.shape, t.bytes) for t in tensors])
    activations = [(t["name"], t["shape"], t["bytes"]) for t in seen.get("activations", ())[:8]]
    where = "" if place == chip.name else f", as compiled for {place}"
    lines += _listed(f"largest that the program makes{where}", activations)
    lines.append("  what would change it (estimated: the state exactly, the rest in proportion):")
    for change in changes:
        verdict = "fits" if change.needed <= hbm else "does not fit"
        lines += [f"    {change.settings}", f"      about {size(change.needed)}: {verdict}"]
    lines += [f"  tried: {text}" for text, _ in tried]
    found = next((text for text, fits in tried if fits), None)
    mend = found or (f"{likely[0].settings} should fit (estimated)" if likely else None)
    mend = mend or "take more chips, or chips with more memory"
    return {
        "needed": needed,
        "available": hbm,
        "state": [dataclasses.asdict(tensor) for tensor in tensors],
        "activations": list(seen.get("activations", ())),
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
    asked = re.search(r"\(([\d.]+)([KMGT]?)i?B?\) exceeds", refusal)
    asked = asked or re.search(r"([\d.]+)\s*([KMGT]?)i?B", refusal)
    state = sum(memory.parts_of(plan.state).values())
    return state + (float(asked[1]) * _UNITS[asked[2]] if asked else 0.0)


def _on_a_larger_chip(plan: Plan, chip: Chip, name: str) -> tuple[Mapping[str, Any], str] | None:
    """(the record of the same program, the chip), compiled for as many chips of the most memory.

    A compiler that refuses does not say what was large; one that can does.
    """
    larger, count = chips.CHIPS["v5p"], plan.mesh.size
    if chip.platform != "tpu" or chip.hbm >= larger.hbm or count not in chips.shapes(larger):
        return None
    there = topology.parse(f"v5p-{count * larger.cores}")
    moved = program_lib.plan(plan.config, topology.devices(there))
    track = name.partition("/")[2] or next(iter(plan.tracks))
    made = program_lib.compile_train(moved, track)
    record = measure.program(moved, made, there, larger)
    return (record, larger.name) if "memory" in record else None


# --- changes -----------------------------------------------------------------------------------


def _changes(plan: Plan, needed: float, hbm: float) -> Iterator[Change]:
    """Changes worth a thought, those that cost the least speed first; then, if none of them is
    enough, several together."""
    single = [change for move in _moves(plan) if (change := _estimated(plan, [move], needed))]
    yield from single
    if any(change.needed <= hbm for change in single):
        return
    moves: list = []
    for move in _together(plan):
        moves.append(move)
        change = _estimated(plan, moves, needed)
        if change is None:
            moves.pop()
        elif len(moves) > 1:
            yield change
            if change.needed <= hbm:
                return


def _moves(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """(setting, its fields) of single changes."""
    config = plan.config
    if config.model.remat != "full":
        yield "--gin.ModelConfig.remat=\"'full'\"", {"remat": "full"}
    for more in (2, 4):
        yield f"--gin.train.accumulate={config.accumulate * more}", {"accumulate": more}
    for tensor in (1, 2, 4):
        yield from _layout(plan, tensor)


def _together(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes to add up: the state divided first, then what the step keeps."""
    yield from _layout(plan, 1)
    if plan.config.model.remat != "full":
        yield "--gin.ModelConfig.remat=\"'full'\"", {"remat": "full"}
    for more in (2, 4, 8, 16):
        yield f"--gin.train.accumulate={plan.config.accumulate * more}", {"accumulate": more}


def _layout(plan: Plan, tensor: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All devices of a slice fsdp, but for some that are tensor."""
    mesh = plan.mesh.shape
    within = plan.mesh.size // (mesh["replica"] * mesh["sequence"])
    fsdp = within // tensor
    if within % tensor or (fsdp, tensor) == (mesh["fsdp"], mesh["tensor"]):
        return
    sharding = Sharding(
        mesh["replica"], 1, fsdp, mesh["sequence"], tensor, plan.config.sharding.rules
    )
    text = "--gin.train.sharding=@Sharding() --gin.Sharding.data=1 "
    text += f"--gin.Sharding.fsdp={fsdp} --gin.Sharding.tensor={tensor}"
    yield text, {"sharding": sharding}


def _estimated(
    plan: Plan, moves: Sequence[tuple[str, dict[str, Any]]], needed: float
) -> Change | None:
    """Several changes at once, with what they would need; None where they are not possible.

    The state and its gradients are counted exactly. Of the rest, half the rows at a time, or twice
    the tensor axis, are taken to need half, and full recomputation what enters each layer and one
    layer's share.
    """
    fields = {name: value for _, change in moves for name, value in change.items()}
    config, model = plan.config, plan.config.model
    if "remat" in fields:
        model = dataclasses.replace(model, remat=fields["remat"])
    try:
        changed = dataclasses.replace(
            config,
            model=model,
            accumulate=config.accumulate * fields.get("accumulate", 1),
            sharding=fields.get("sharding", config.sharding),
        )
        other = program_lib.plan(changed, list(plan.mesh.devices.flat))
    except UserError:
        return None
    parts, before = (x.config.sharding.parts(x.mesh, "batch") for x in (other, plan))
    share = before / parts * plan.mesh.shape["tensor"] / other.mesh.shape["tensor"]
    share *= config.accumulate / changed.accumulate
    rest = max(0.0, needed - _fixed(plan)) * share
    if "remat" in fields:
        depth = max(model.stacks.values())
        rest = min(rest, rest / depth + _entering(other))
    settings = dict(text.split("=", 1) for move, _ in moves for text in _flags(move))
    joined = " ".join(f"{name}={value}" for name, value in settings.items())
    return Change(joined, changed, _fixed(other) + rest)


def _flags(settings: str) -> list[str]:
    return [f"--gin.{text.strip()}" for text in settings.split("--gin.") if text.strip()]


def _fixed(plan: Plan) -> float:
    """Bytes of the state and of the parameters' gradients in float32."""
    leaves = jax.tree.leaves(plan.state.params)
    gradients = sum(memory.on_device(leaf) / leaf.dtype.itemsize * 4 for leaf in leaves)
    return sum(memory.parts_of(plan.state).values()) + gradients


def _entering(plan: Plan) -> float:
    """Bytes of what enters each layer, of the rows that a device computes at a time."""
    model, total = plan.data.model, 0.0
    rows = plan.config.sharding.parts(plan.mesh, "batch") * plan.config.accumulate
    for batches in plan.data.pipelines.values():
        for stack, depth in model.stacks.items():
            tokens = 1
            for length in batches.spec()[f"{stack}_input_tokens"][0]:
                tokens *= length
            width = jax.numpy.dtype(model.dtype).itemsize
            total = max(total, depth * tokens / rows * model.d_model * width)
    return total


def _try(change: Change, plan: Plan, hbm: float) -> tuple[str, bool]:
    """(what came of compiling a change, whether it fits)."""
    changed = program_lib.plan(change.config, list(plan.mesh.devices.flat))
    peak = 0.0
    for made in program_lib.train_programs(changed):
        if made.compiled is None:
            return f"{change.settings} does not fit either (compiled)", False
        peak = max(peak, memory.of(made.compiled).peak)
    fits = peak <= hbm
    verdict = "fits" if fits else "does not fit"
    return f"{change.settings} {verdict}: {size(peak)} (compiled)", fits
