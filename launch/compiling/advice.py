"""What is large, and which setting would make a run fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.compiling import (
    changes as changes_lib,
    chips,
    measure,
    memory,
    program as program_lib,
    topology,
)
from launch.compiling.changes import Change, Decoded
from launch.compiling.chips import GIB, Chip
from launch.compiling.program import Plan
from launch.compiling.report import size, table

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


def advise(
    plan: Plan, chip: Chip, tight: Mapping[str, Any], tries: int, decoded: Decoded | None = None
) -> dict[str, Any]:
    """The advice as JSON values, with "lines" to print and a "summary" of one line.

    Args:
      tight: the record of the program that does not fit.
      tries: most changes that are tried by compiling.
      decoded: of a generate program; None for a train step.
    """
    hbm, seen, place = chip.hbm, tight, chip.name
    if "memory" not in tight and tries and decoded is None:
        larger = _on_a_larger_chip(plan, chip, tight["name"])
        seen, place = larger or (tight, place)
    if "memory" in seen:
        needed = seen["memory"]["peak"]
    else:
        needed = _needed(plan, tight["refusal"], decoded)
    begin = "" if decoded is None else "params/model/"
    tensors = [t for t in memory.state_tensors(plan.state) if t.name.startswith(begin)]
    tensors = sorted(tensors, key=lambda t: -t.bytes)[:8]
    changes = list(changes_lib.of(plan, needed, hbm, decoded))
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


def _needed(plan: Plan, refusal: str, decoded: Decoded | None) -> float:
    """Bytes that a program needs, from the compiler's refusal.

    It says either what the whole program uses or what its temporaries do, beside which the state
    and the batch lie.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm", refusal)
    if used:
        return float(used[1]) * _UNITS[used[2]]
    asked = re.search(r"\(([\d.]+)([KMGT]?)i?B?\) exceeds", refusal)
    asked = asked or re.search(r"([\d.]+)\s*([KMGT]?)i?B", refusal)
    state = changes_lib.held(plan, decoded)
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


def _try(change: Change, plan: Plan, hbm: float) -> tuple[str, bool]:
    """(what came of compiling a change, whether it fits)."""
    changed = program_lib.plan(change.config, list(plan.mesh.devices.flat))
    if change.decoded is None:
        programs = program_lib.train_programs(changed)
    else:
        rows, new_tokens = change.decoded.rows, change.decoded.new_tokens
        programs = [program_lib.compile_generate(changed, rows, new_tokens)]
    peak = 0.0
    for made in programs:
        if made.compiled is None:
            return f"{change.settings} does not fit either (compiled)", False
        peak = max(peak, memory.of(made.compiled).peak)
    fits = peak <= hbm
    verdict = "fits" if fits else "does not fit"
    return f"{change.settings} {verdict}: {size(peak)} (compiled)", fits
