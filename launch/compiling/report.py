"""The record of a compile as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.compiling.roofline import ASSUMPTIONS

WIDTH = 100
_SHOWN = 10


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The whole report, in lines of at most WIDTH columns but for settings to copy."""
    for line in (*_lines(record), "", *_assumptions()):
        indent = len(line) - len(line.lstrip())
        if len(line) <= WIDTH or line.lstrip().startswith("--"):
            yield line
        else:
            yield from textwrap.wrap(line, WIDTH, subsequent_indent=" " * (indent + 2))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    axes = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    chips = record["chips"] or record["devices"]
    devices = "" if chips == record["devices"] else f", {record['devices']} devices"
    yield f"{record['topology']}: {chips} x {record['device_kind']}{devices}; mesh {axes or '1'}"
    parts = ", ".join(f"{name} {size(n)}" for name, n in record["state"].items() if n)
    yield f"{record['parameters'] / 1e6:,.1f} M parameters; a device holds {parts}"
    yield (
        f"batch {record['batch_size']} rows, train.accumulate {record['accumulate']}, "
        f"remat {record['remat']!r}"
    )
    for program in record["programs"]:
        yield ""
        yield from _program(program, record)
    if record.get("advice"):
        yield ""
        yield from record["advice"]["lines"]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def number(count: float) -> str:
    """FLOPs for people."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:,.3f} {unit}"
    return f"{count:.0f} "


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3f} ms"


def _program(program: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    batch = program["batch"]
    first = next(name for name in batch if name.endswith("input_tokens"))
    shape = " x ".join(map(str, batch[first]))
    took = program["seconds"]
    yield (
        f"{program['name']}: {first} {shape}; traced in {took['trace']:.1f} s, compiled in "
        f"{took['compile']:.1f} s"
    )
    if "memory" not in program:
        yield f"  memory      does not fit: {program['refusal'].splitlines()[0][:WIDTH - 30]}"
        return
    yield from _memory(program["memory"], record["hbm"])
    yield from _loops(program["unknown_loops"])
    yield from _flops(program["flops"])
    yield f"  moved       {size(program['bytes'])} of main memory, an upper estimate"
    yield from _collectives(program)
    if program.get("roofline"):
        yield from _roofline(program["roofline"])
    else:
        yield "  roofline    none: no peak is known of this device"


def _memory(used: Mapping[str, float], hbm: float | None) -> Iterator[str]:
    share = f" = {used['peak'] / hbm:.1%} of {size(hbm)}" if hbm else ""
    yield f"  memory      peak {size(used['peak'])}{share}, on each device"
    yield (
        f"              arguments {size(used['arguments'])}, outputs {size(used['outputs'])} "
        f"({size(used['aliased'])} in place), temporaries {size(used['temporaries'])}"
    )


def _flops(flops: Mapping[str, Any]) -> Iterator[str]:
    model = f"model {number(flops['model'])}FLOP, " if flops["model"] else ""
    ratio = f", {flops['ratio']:.3f} of the model's" if flops["ratio"] else ""
    yield f"  products    {model}compiled {number(flops['compiled'])}FLOP a device{ratio}"
    stages = [f"{name} {number(value)}" for name, value in flops["stages"].items() if value]
    if flops["kernels"]:
        stages.append(f"of these in attention kernels {number(flops['kernels'])}")
    yield f"              {'; '.join(stages)}"
    if flops["opaque_kernels"]:
        yield f"              unknown, and left out: {len(flops['opaque_kernels'])} kernels"


def _collectives(program: Mapping[str, Any]) -> Iterator[str]:
    found = program["collectives"]
    if not found:
        yield "  collectives none"
        return
    line = f"  collectives {size(program['wire'])} sent by each device"
    least = program.get("floor")
    if least and least["ratio"]:
        line += f", {least['ratio']:.3f} of the floor ({size(least['total'])})"
    yield line
    rows = [
        (
            group["kind"], "+".join(group["axes"]) or "irregular", str(group["group"]),
            f"{group['times']:.0f}", size(group["bytes"]), group["shape"],
        )
        for group in found[:_SHOWN]
    ]  # fmt: skip
    yield from table(("kind", "over", "n", "times", "bytes", "of"), rows)
    if len(found) > _SHOWN:
        rest = sum(group["bytes"] for group in found[_SHOWN:])
        yield f"              {len(found) - _SHOWN} more kinds and shapes, {size(rest)}"


def _loops(unknown: Mapping[str, int]) -> Iterator[str]:
    count, trips = unknown["count"], unknown["trips"]
    if count:
        times = "once" if trips == 1 else f"{trips} times"
        yield f"  loops       {count} loop{'s' * (count > 1)} of unknown length, counted {times}"


def _roofline(found: Mapping[str, Any]) -> Iterator[str]:
    links = ", ".join(f"{axes} {seconds(s)}" for axes, s in found["collectives"].items())
    mfu = found["mfu"]
    yield (
        f"  roofline    about {seconds(found['best'])} to {seconds(found['worst'])} a call"
        + (f", MFU about {mfu[0]:.0%} to {mfu[1]:.0%}" if mfu else "")
    )
    yield (
        f"              products {seconds(found['products'])}, memory {seconds(found['memory'])}, "
        f"operation by operation {seconds(found['operations'])}"
    )
    if links:
        yield f"              links: {links}; {seconds(found['asynchronous'])} may hide"


def _assumptions() -> Iterator[str]:
    """What the roofline takes for granted."""
    yield "The roofline is an estimate, not a forecast:"
    yield from (f"  - {line}" for line in ASSUMPTIONS)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 14) -> Iterator[str]:
    """Columns as wide as what is in them; the last is cut at WIDTH."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        line = " " * indent + "  ".join([*cells, row[-1]])
        yield line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
