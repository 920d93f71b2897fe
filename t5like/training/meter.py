"""Exact sums of what updates report, fetched from the device once a log line."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax

from t5like.errors import UserError
from t5like.training.step import StepMetrics
from t5like.training.terms import Term


class NonFiniteLoss(UserError):
    """The loss or a norm is not a finite number."""


class Meter:
    """Collects updates' metrics between log lines.

    Metrics stay on the device until `fetch`, which gets all of them in one transfer. Each loss
    term of a line is the sum over its interval's batches divided by their weight, for each track
    (see tracks.py) apart: different objectives' terms have little but their names in common. The
    state is JSON (`snapshot`), so a resumed run writes the lines that it would have written
    anyway.
    """

    def __init__(self, snapshot: dict[str, Any] | None = None):
        snapshot = snapshot or {}
        self._sums: dict[str, dict[str, list[float]]] = snapshot.get("sums", {})
        self._updates: dict[str, int] = snapshot.get("updates", {})
        self._hash: str = snapshot.get("hash", "")
        self._scalars: dict[str, float] = {}
        self._waiting: list[tuple[int, str, StepMetrics]] = []

    def add(self, step: int, track: str, metrics: StepMetrics, batch_hash: str = "") -> None:
        """Takes the metrics of the update of `track` that made `step`, unfetched."""
        self._waiting.append((step, track, metrics))
        if batch_hash:
            chained = (self._hash + batch_hash).encode()
            self._hash = hashlib.blake2b(chained, digest_size=8).hexdigest()

    def wait_for_all_but(self, count: int) -> None:
        """Blocks until at most `count` updates are still running."""
        if len(self._waiting) > count:
            jax.block_until_ready(self._waiting[-1 - count][-1])

    def fetch(self) -> None:
        """Gets everything waiting in one `jax.device_get` and adds it up.

        Raises:
          NonFiniteLoss: naming the first step whose loss or norms are not finite.
        """
        if not self._waiting:
            return
        steps, tracks, metrics = zip(*self._waiting, strict=True)
        self._waiting = []
        for step, track, values in zip(steps, tracks, jax.device_get(metrics), strict=True):
            _check_finite(step, values)
            add_terms(self._sums.setdefault(track, {}), values.terms)
            self._updates[track] = self._updates.get(track, 0) + 1
            self._scalars = {name: float(value) for name, value in values.scalars.items()}

    def line(self, by_track: bool = False) -> dict[str, Any]:
        """The interval's losses and its last update's scalars; starts a new interval.

        Args:
          by_track: whether to name terms "TRACK/TERM"; "loss" is then the mean of the tracks'
            losses, weighted by their updates.

        Returns:
          {"loss", each term, "gradient_norm", "update_norm", "parameter_norm",
          "learning_rate", and "batch_hash" where batches are hashed: a hash of the hashes}.
        """
        self.fetch()
        values = {track: means(sums) for track, sums in self._sums.items()}
        if by_track:
            line = {f"{track}/{name}": x for track, v in values.items() for name, x in v.items()}
            loss = sum(values[track]["loss"] * count for track, count in self._updates.items())
            line["loss"] = loss / sum(self._updates.values())
        else:
            [line] = values.values()
        line |= self._scalars
        if self._hash:
            line["batch_hash"] = self._hash
        self._sums, self._updates, self._hash = {}, {}, ""
        return line

    def snapshot(self) -> dict[str, Any]:
        """The interval so far, as JSON values; fetches what waits."""
        self.fetch()
        return {
            "sums": {
                track: {name: list(row) for name, row in sums.items()}
                for track, sums in self._sums.items()
            },
            "updates": dict(self._updates),
            "hash": self._hash,
        }


def add_terms(sums: dict[str, list[float]], terms: dict[str, Term]) -> None:
    """Adds fetched terms to {name: [sum, weight, coefficient]} in float64."""
    for name, term in terms.items():
        row = sums.setdefault(name, [0.0, 0.0, term.coefficient])
        row[0] += float(term.sum)
        row[1] += float(term.weight)


def means(sums: dict[str, list[float]]) -> dict[str, float]:
    """{"loss": the weighted total, name: mean of each term}; weight 0 gives 0.

    A term called "loss" gives way to the total; when it is the only one that counts they agree.
    """
    values = {name: total / weight if weight else 0.0 for name, (total, weight, _) in sums.items()}
    loss = sum(sums[name][2] * value for name, value in values.items() if sums[name][2])
    return {**values, "loss": loss}


def _check_finite(step: int, values: StepMetrics) -> None:
    """Metrics of coefficient 0 may be anything: they do not reach the parameters."""
    numbers = {
        f"the sum of {name!r}": term.sum
        for name, term in values.terms.items()
        if term.coefficient
    }
    numbers |= {f"the {name.replace('_', ' ')}": value for name, value in values.scalars.items()}
    for name, value in numbers.items():
        if not math.isfinite(float(value)):
            raise NonFiniteLoss(
                f"{name} is {float(value)} at step {step}; the checkpoints before it are good: "
                "in another --workdir, with train.init_from set to this one, lower the learning "
                "rate, set the optimiser's clip_norm or lengthen the warm-up"
            )
