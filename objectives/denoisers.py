"""The denoisers that UL2 mixes: what one is, and the objective that does its work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from objectives import noise
from objectives.base import Setting
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from t5like.errors import UserError

MODES = ("R", "S", "X")


class Denoiser(NamedTuple):
    """One way to corrupt a text (Tay et al. 2023, "UL2", section 3.1.2 and table 1).

    Attributes:
      mode: "R" (regular) or "X" (extreme) for span corruption, "S" (sequential) for a prefix and
        its continuation.
      mean_span: mean tokens of a noise span; None for S.
      density: share of noise tokens; the expected share of the suffix for S.
    """

    mode: str
    mean_span: float | None
    density: float

    @property
    def name(self) -> str:
        """Such as "R(3, 0.15)" or "S(0.25)"; names the component and its metric."""
        span = "" if self.mean_span is None else f"{self.mean_span:g}, "
        return f"{self.mode}({span}{self.density:g})"

    def objective(
        self, setting: Setting, random_roll: bool, s_sentinel: bool, **shared: object
    ) -> SpanCorruption | PrefixLM:
        """What corrupts texts in this way, for rows as `setting` has them.

        Its `bind` is passed by: the errors would speak of fields that nobody has set.

        Args:
          random_roll: see SpanCorruption; without it a single span lies anywhere all the same.
          s_sentinel: see PrefixLM.sentinel.
          shared: fields of both.
        """
        shared |= {"noise_density": self.density, "setting": setting}
        if self.mode == "S":
            return PrefixLM(sentinel=s_sentinel, **shared)
        return _Spans(mean_noise_span_length=self.mean_span, random_roll=random_roll, **shared)


def parse(denoiser: Sequence) -> Denoiser:
    """(mode, mean span, density) as a Denoiser; raises UserError if it is none."""
    try:
        mode, mean_span, density = denoiser
        known = mode in MODES and 0 < density < 1
        known &= mean_span is None if mode == "S" else mean_span >= 1
    except (TypeError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"UL2.denoisers has {denoiser!r}; write ('R', mean span, density), ('X', mean span, "
            "density) or ('S', None, density) with a mean span of at least 1 and a density "
            "between 0 and 1"
        )
    return Denoiser(mode, mean_span, density)


class _Spans(SpanCorruption):
    """Span corruption whose span, where it is the only one, lies anywhere."""

    def _spans(self, length: int, rng: np.random.Generator) -> noise.Spans:
        spans = super()._spans(length, rng)
        if self.random_roll or len(spans.starts) != 1:
            return spans
        size = spans.ends - spans.starts
        start = rng.integers(length - size, endpoint=True)
        return noise.Spans(start, start + size)
