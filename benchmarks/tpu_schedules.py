"""Final schedules of TPU kernels, read from what libtpu dumps as it compiles.

The dump has one line a bundle (the instructions that issue together) with the use of each unit, and
a listing of the bundles. Import this module before anything has been compiled for a TPU.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
import re
import tempfile

import numpy as np

_SCRATCH = tempfile.TemporaryDirectory(prefix="llo")
# Read as libtpu loads, which is when a topology is first asked for.
os.environ["LIBTPU_INIT_ARGS"] = " ".join(
    (
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={_SCRATCH.name} --xla_jf_dump_llo_text=true",
    )
)
_UTILIZATION = "-final_hlo-static-per-bundle-utilization.txt"
_SCHEDULE = "-final_bundles.txt"


@dataclasses.dataclass(frozen=True)
class Path:
    """What one grid step executes at most: a kernel without the bodies that exclude this one.

    Attributes:
      block: bundles of the body alone, between two branches: what an active block costs.
      bundles: of the whole path, with the pipeline's prologue and epilogue.
      mxu, xlu: slots of the matrix units and of the cross-lane units in use.
      spills: vector registers stored because there were too few.
      fill: mxu over the slots there are.
    """

    block: int
    bundles: int
    mxu: int
    xlu: int
    spills: int
    fill: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's final schedule: all its bundles, and a path for each body with matrix products.

    A kernel may have one body for full and one for partial blocks, in this order.
    """

    bundles: int
    paths: tuple[Path, ...]


def take_schedules() -> dict[str, Schedule]:
    """Kernel name -> schedule, of the kernels with matrix products compiled since the last call."""
    folder = pathlib.Path(_SCRATCH.name)
    found = {}
    for file in sorted(folder.glob(f"*{_UTILIZATION}")):
        stem = re.sub(r"-\d+$", "", file.name.removesuffix(_UTILIZATION))
        (schedule,) = folder.glob(f"{glob.escape(stem)}-*{_SCHEDULE}")
        found[re.sub(r"^\d+-|\.\d+$", "", stem)] = parse(file.read_text(), schedule.read_text())
    for file in folder.iterdir():
        file.unlink()
    return {name: schedule for name, schedule in found.items() if schedule.paths}


def parse(utilization: str, listing: str) -> Schedule:
    """The schedule in libtpu's use of units a bundle and in its listing of the bundles."""
    header, table = utilization.split("== UTILIZATION:")
    units, capacities = header.strip().splitlines()[-2:]
    capacity = dict(zip(units.split(", "), map(int, capacities.split()), strict=True))
    use = np.array([line.split() for line in table.strip().splitlines()], int)
    column = dict(zip(capacity, use.T, strict=True))
    lines = [line for line in listing.splitlines() if re.match(r"\s*(0x[0-9a-f]+|0)\s", line)]
    labels = [i for i, line in enumerate(lines) if re.match(r"\s*0x[0-9a-f]+\s+[A-Z]{2}:", line)]
    branches = [i + 1 for i, line in enumerate(lines) if "sbr.rel" in line]
    edges = sorted({0, *labels, *branches, len(lines)})
    spans = [slice(*span) for span in zip(edges, edges[1:], strict=False)]
    bodies = [span for span in spans if column["MXU"][span].any()]
    paths = []
    for body in bodies:
        on = np.ones(len(use), bool)
        for other in bodies:
            on[other] = other == body
        mxu, xlu, spills = (int(column[u][on].sum()) for u in ("MXU", "XLU", "VSTORE:SPILL"))
        fill = mxu / (on.sum() * capacity["MXU"])
        paths.append(Path(body.stop - body.start, int(on.sum()), mxu, xlu, spills, fill))
    return Schedule(len(use), tuple(paths))
