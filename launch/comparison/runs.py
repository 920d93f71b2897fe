"""Trains the runs of a comparison and measures them; what is done once is kept beside each run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from launch.comparison.config import CompareConfig
from launch.comparison.trials import Trial
from launch.files import read_json, write_whole
from t5like.errors import UserError

TRIAL, MEASURES = "trial.json", "measures.json"


def finished(config: CompareConfig, trial: Trial) -> dict[str, Any] | None:
    """The trial's result (see report.py), if it is trained and measured as it is configured."""
    trained = (read_json(trial.workdir / TRIAL) or {}).get("trained")
    measured = read_json(trial.workdir / MEASURES)
    if trained is None or measured is None or measured.get("key") != _measure_key(config, trial):
        return None
    points = [
        point | {"measures": measures}
        for point, measures in zip(trained["points"], measured["points"], strict=True)
    ]
    return trained | {"points": points}


def run(config: CompareConfig, trial: Trial) -> dict[str, Any]:
    """Trains the trial to its end and measures it, as far as that is not done; its result.

    Raises:
      UserError: names the run. Its workdir may hold a training of another configuration or
        budget, which going on would mix with this one.
    """
    try:
        trained = _trained(config, trial)
        last = len(trained["points"]) - 1
        points = [
            measure(config, _names(config, trial, at_end=number == last), trial, point["step"])
            for number, point in enumerate(trained["points"])
        ]
    except UserError as error:
        raise UserError(f"run {trial.name!r}, seed {trial.seed}: {error}") from error
    measured = {"key": _measure_key(config, trial), "points": points}
    write_whole(trial.workdir / MEASURES, json.dumps(measured, indent=1) + "\n")
    result = finished(config, trial)
    assert result is not None
    return result


def _trained(config: CompareConfig, trial: Trial) -> dict[str, Any]:
    """What is known of the trial's training, which is brought to its end."""
    path = trial.workdir / TRIAL
    known = read_json(path)
    if known is not None and known.get("key") != trial.key:
        raise UserError(
            f"{trial.workdir} holds a run of another configuration or budget: choose another "
            "--workdir, or delete that folder"
        )
    if known is not None and known["trained"] is not None:
        return known["trained"]
    write_whole(path, json.dumps({"key": trial.key, "trained": None}) + "\n")

    from launch import training

    done = training.train_resolved(
        trial.resolved, str(trial.workdir), points=config.points, progress=False
    )
    tokens, flops = done.spent(done.points[-1])
    trained = {
        "steps": done.points[-1],
        "tokens": tokens,
        "flops": flops,
        "compiled_flops": done.result.compiled_flops,
        "seconds": seconds_of_updates(trial.workdir / "metrics.jsonl"),
        "points": [{"step": step, "flops": done.spent(step)[1]} for step in done.points],
    }
    write_whole(path, json.dumps({"key": trial.key, "trained": trained}, indent=1) + "\n")
    return trained


def seconds_of_updates(metrics: epath.Path) -> float:
    """Seconds that a run's updates took, from its log: compilation and set-up left out."""
    seconds, before = 0.0, 0
    for line in map(json.loads, metrics.read_text().splitlines()):
        if line["split"] == "train":
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return seconds


def _names(config: CompareConfig, trial: Trial, *, at_end: bool) -> Iterable[str]:
    """Measures that are taken of one of the trial's checkpoints."""
    if trial.name in config.hidden:
        return ()
    return config.measures if at_end else config.curve


def measure(
    config: CompareConfig, names: Iterable[str], trial: Trial, step: int
) -> dict[str, float]:
    """{"measure/metric": value} of the trial's checkpoint of `step`."""
    names = list(names)
    if not names:
        return {}

    from launch.runs import load_trained

    model = load_trained(str(trial.workdir / "checkpoints" / str(step)))
    found = {}
    for name in names:
        for metric, value in config.measures[name].measure(model, trial.seed).items():
            found[f"{name}/{metric}"] = float(value)
    return found


def _measure_key(config: CompareConfig, trial: Trial) -> str:
    """Changes with the trained model and with what is measured of it."""
    ends = [
        {name: repr(config.measures[name]) for name in _names(config, trial, at_end=at_end)}
        for at_end in (False, True)
    ]
    content = json.dumps([trial.key, ends], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
