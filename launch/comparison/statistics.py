"""Means over seeds, differences seed by seed, and the smallest effect that could have shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Summary:
    """One measure of one run over its seeds.

    Attributes:
      mean, spread: mean and sample standard deviation; the spread of one seed is NaN.
      seeds: how many.
      difference: mean difference to the baseline over the seeds that both have, or NaN.
      smallest_effect: half the width of the 95% interval of that difference (Student's t on the
        seeds' paired differences): a smaller true effect could not have been told from none.
        NaN with fewer than two pairs.
    """

    mean: float
    spread: float
    seeds: int
    difference: float
    smallest_effect: float

    @property
    def shows(self) -> bool:
        """Whether the difference is larger than the smallest effect that could have shown."""
        return abs(self.difference) > self.smallest_effect


def summarise(values: Mapping[int, float], baseline: Mapping[int, float]) -> Summary:
    """Summary of {seed: value} beside the baseline's."""
    own = np.array(list(values.values()), float)
    pairs = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return Summary(
        mean=float(own.mean()),
        spread=_spread(own),
        seeds=len(own),
        difference=float(np.mean(pairs)) if pairs else math.nan,
        smallest_effect=_half_interval(np.array(pairs, float)),
    )


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _half_interval(differences: np.ndarray) -> float:
    from scipy import stats

    count = len(differences)
    if count < 2:
        return math.nan
    return float(stats.t.ppf(0.975, count - 1)) * _spread(differences) / math.sqrt(count)
