"""The runs of a comparison, configured: every page and binding is read before the first is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from etils import epath

from launch import config as config_lib
from launch.comparison.config import CompareConfig, folder
from launch.run_config import FREE
from t5like.errors import UserError

# Of the free settings, those that a comparison fixes, so that results hold for them alone.
_FIXED = {"tokens", "flops", "steps"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
      name, seed: which.
      workdir: where it lives: WORKDIR/runs/NAME/seed-SEED.
      resolved: its configuration, budget and seed included.
      key: changes with all that the trained model depends on: its settings, budget and points,
        and the keys of the runs that it starts from.
    """

    name: str
    seed: int
    workdir: epath.Path
    resolved: config_lib.Resolved
    key: str


def trials(config: CompareConfig, workdir: epath.Path) -> list[Trial]:
    """Every run of every seed: all runs of the first seed, then of the second ...

    Raises:
      UserError: a configuration is wrong; names the run.
    """
    planned = []
    for seed in config.seeds:
        made: dict[str, Trial] = {}
        for name in config.runs:
            try:
                made[name] = _trial(config, name, seed, made, workdir)
            except UserError as error:
                raise UserError(f"compare.runs[{name!r}]: {error}") from error
        planned += made.values()
    return planned


def _trial(
    config: CompareConfig, name: str, seed: int, made: Mapping[str, Trial], workdir: epath.Path
) -> Trial:
    entries = [*config.base, *config.runs[name]]
    kind, amount = config.budget(name)
    fixed = {
        "cache_dir": str(workdir / "cache"),
        **dict.fromkeys(("evals", "keep_best", "steps", "tokens", "flops")),
        "quality": False,
        "seed": seed,
        kind: amount,
    }
    bindings = [f"train.{field} = {value!r}" for field, value in fixed.items()]
    bindings += [_filled(entry, seed, made) for entry in entries if not is_page(entry)]
    resolved = config_lib.load([entry for entry in entries if is_page(entry)], bindings)
    free = {f"train.{field}" for field in FREE - _FIXED}
    content = {
        "settings": {k: v for k, v in resolved.bindings.items() if k not in free},
        "objects": resolved.objects,
        "points": config.points,
        "from": {other: made[other].key for other in _named(entries, made)},
    }
    key = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()
    place = workdir / "runs" / folder(name) / f"seed-{seed}"
    return Trial(name, seed, place, resolved, key)


def is_page(entry: str) -> bool:
    """Whether an entry of compare.base or compare.runs is a page, not a binding."""
    return entry.endswith(".gin")


def _named(entries: list[str], made: Mapping[str, Trial]) -> list[str]:
    """Runs whose workdirs the entries ask for."""
    return [name for name in made if any("{" + name + "}" in entry for entry in entries)]


def _filled(binding: str, seed: int, made: Mapping[str, Trial]) -> str:
    """The binding with {seed} and every {NAME} replaced."""
    for name, trial in made.items():
        binding = binding.replace("{" + name + "}", str(trial.workdir))
    return binding.replace("{seed}", str(seed))
