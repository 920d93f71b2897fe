"""The runs of a comparison: each is trained (or resumed), measured once, kept as result.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from launch import config as config_lib
from launch.comparison.config import CompareConfig, folder
from t5like.data.atomic import writing
from t5like.errors import UserError

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
      name, seed: which.
      workdir: where it lives: WORKDIR/runs/NAME/seed-SEED.
      pages, bindings: its configuration, budget and seed included.
      key: changes with whatever the result depends on.
    """

    name: str
    seed: int
    workdir: epath.Path
    pages: tuple[str, ...]
    bindings: tuple[str, ...]
    key: str


def trials(config: CompareConfig, workdir: epath.Path) -> Iterator[Trial]:
    """Every run of every seed: all runs of the first seed, then of the second ..."""
    for seed in config.seeds:
        places = {
            name: str(workdir / "runs" / folder(name) / f"seed-{seed}") for name in config.runs
        }
        for name in config.runs:
            yield _trial(config, name, seed, places, workdir)


def _trial(
    config: CompareConfig, name: str, seed: int, places: Mapping[str, str], workdir: epath.Path
) -> Trial:
    own = [*config.base, *config.runs[name]]
    pages = tuple(entry for entry in own if "=" not in entry)
    kind, amount = config.budget(name)
    bindings = [
        f"train.cache_dir = {str(workdir / 'cache')!r}",
        "train.evals = None",
        "train.quality = False",
        "train.steps = None",
        "train.tokens = None",
        "train.flops = None",
        f"train.{kind} = {amount!r}",
        f"train.seed = {seed}",
        *(_filled(entry, places) for entry in own if "=" in entry),
    ]
    measures = {n: repr(config.measures[n]) for n in config.measures}
    others = {n: list(config.runs[n]) for n in config.runs if "{" + n + "}" in "".join(own)}
    content = [own, others, kind, amount, seed, config.points, list(config.curve), measures]
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()
    return Trial(name, seed, epath.Path(places[name]), pages, tuple(bindings), key)


def _filled(binding: str, places: Mapping[str, str]) -> str:
    """The binding with every {NAME} replaced by that run's workdir."""
    for name, place in places.items():
        binding = binding.replace("{" + name + "}", place)
    return binding


def finished(trial: Trial) -> dict[str, Any] | None:
    """The trial's result if it was made from this very configuration."""
    path = trial.workdir / RESULT
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result["result"] if result["key"] == trial.key else None


def run(config: CompareConfig, trial: Trial) -> dict[str, Any]:
    """Trains the trial to its end and measures it; see report.py for the result.

    Raises:
      UserError: its configuration is wrong; names the run.
    """
    try:
        return _run(config, trial)
    except UserError as error:
        raise UserError(f"run {trial.name!r}, seed {trial.seed}: {error}") from error


def _run(config: CompareConfig, trial: Trial) -> dict[str, Any]:
    from launch import training

    started = time.monotonic()
    resolved = config_lib.load(trial.pages, trial.bindings)
    trained = training.train_resolved(
        resolved, str(trial.workdir), points=config.points, progress=False
    )
    seconds = time.monotonic() - started
    points = []
    for step in trained.points:
        last = step == trained.points[-1]
        names = config.measures if last else config.curve
        measures = measure(config, names, trial, step) if names else {}
        points.append({"step": step, "flops": trained.spent(step)[1], "measures": measures})
    tokens, flops = trained.spent(trained.points[-1])
    result = {
        "steps": trained.points[-1],
        "tokens": tokens,
        "flops": flops,
        "compiled_flops": trained.result.compiled_flops,
        "seconds": seconds,
        "points": points,
    }
    path = trial.workdir / RESULT
    with writing(path):
        path.write_text(json.dumps({"key": trial.key, "result": result}, indent=1) + "\n")
    return result


def measure(config: CompareConfig, names, trial: Trial, step: int) -> dict[str, float]:
    """{"measure/metric": value} of the trial's checkpoint of `step`."""
    from launch.runs import load_trained

    model = load_trained(str(trial.workdir / "checkpoints" / str(step)))
    found = {}
    for name in names:
        for metric, value in config.measures[name].measure(model, trial.seed).items():
            found[f"{name}/{metric}"] = float(value)
    return found
