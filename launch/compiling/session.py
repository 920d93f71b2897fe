"""One call of `launch/compile.py`: plan, compile, measure, and advise where it does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from launch.compiling import advice, changes, measure, program
from launch.compiling.topology import Topology, chip_of, devices
from launch.files import write_whole
from launch.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for, see there."""

    generate: bool = True
    generate_batch: int = 0
    max_new_tokens: int = 64
    tries: int = 1
    save_hlo: str | None = None


def compile_run(config: RunConfig, topology: Topology, asked: Asked) -> dict[str, Any]:
    """The record of a compile, see measure.py; "advice" is None where everything fits.

    Raises:
      UserError: as training would, or the hardware cannot be compiled for.
    """
    absent = devices(topology)
    planned = program.plan(config, absent)
    chip = chip_of(topology, absent[0])
    record = measure.run(planned, topology, chip)
    programs = program.train_programs(planned)
    rows = asked.generate_batch or config.sharding.parts(planned.mesh, "batch")
    if asked.generate and program.can_generate(planned):
        programs.append(program.compile_generate(planned, rows, asked.max_new_tokens))
    record["programs"] = [measure.program(planned, made, topology, chip) for made in programs]
    if asked.save_hlo:
        _save(programs, asked.save_hlo)
    tight = next((made for made in record["programs"] if not made["fits"]), None)
    record["advice"] = None
    if tight is not None:
        decoded = None
        if tight["name"] == "generate":
            decoded = changes.Decoded(rows, bool(asked.generate_batch), asked.max_new_tokens)
        record["advice"] = advice.advise(planned, chip, tight, asked.tries, decoded)
    return record


def _save(programs: list[program.Program], folder: str) -> None:
    for made in programs:
        if made.compiled is not None:
            name = made.name.replace("/", "-")
            write_whole(epath.Path(folder) / f"{name}.hlo.txt", made.compiled.as_text())
