"""Means over seeds, differences seed by seed, and the smallest effect that could have shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

# Pairs of seeds below which no difference is called one.
_LEAST_PAIRS = 3


@dataclasses.dataclass(frozen=True)
class Summary:
    """One measure of one run over its seeds.

    Attributes:
      mean, spread: mean and sample standard deviation; the spread of one seed is NaN.
      seeds: how many.
      difference: mean difference to the baseline over the seeds that both have, or NaN.
      interval: half the width of the 95% interval of that difference (Student's t on the seeds'
        paired differences); NaN with fewer than three pairs.
      smallest_effect: the true difference that such an interval would have excluded 0 for in
        four cases of five (power 0.8); NaN likewise. Both know of the seeds' spread alone, not
        of the test set's own error, which all seeds share.
    """

    mean: float
    spread: float
    seeds: int
    difference: float
    interval: float
    smallest_effect: float

    @property
    def shows(self) -> bool:
        """Whether 0 lies outside the difference's interval."""
        return abs(self.difference) > self.interval


def summarise(values: Mapping[int, float], baseline: Mapping[int, float]) -> Summary:
    """Summary of {seed: value} beside the baseline's."""
    own = np.array(list(values.values()), float)
    pairs = np.array([values[seed] - baseline[seed] for seed in values if seed in baseline], float)
    interval, smallest = _half_widths(pairs)
    return Summary(
        mean=float(own.mean()),
        spread=float(own.std(ddof=1)) if len(own) > 1 else math.nan,
        seeds=len(own),
        difference=float(pairs.mean()) if len(pairs) else math.nan,
        interval=interval,
        smallest_effect=smallest,
    )


def _half_widths(differences: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    count = len(differences)
    if count < _LEAST_PAIRS:
        return math.nan, math.nan
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    certain, powerful = (float(stats.t.ppf(p, count - 1)) for p in (0.975, 0.8))
    return certain * error, (certain + powerful) * error
