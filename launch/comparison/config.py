"""CompareConfig: what is compared, under which budget and by which measures, as gin's `compare`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5like.errors import UserError


def folder(name: str) -> str:
    """The folder of a run: its name with a dash for all but letters, digits, "." and "_"."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison. gin calls it `compare`: `--gin.compare.seeds=[0]`.

    A run is described as a user would on the command line: pages, and bindings 'NAME = VALUE'.
    `{NAME}` in a binding stands for the workdir of the run NAME of the same seed, so that a run
    can go on from another one ("train.init_from = '{start}'"), which must be listed before it.

    Attributes:
      base: pages and bindings that all runs begin with.
      runs: name -> what comes after `base`.
      tokens, flops: the budget of each run, one of them; see t5like/training/budget.py.
      factors: name -> factor on the budget, for controls and for runs that others start from.
      measures: name -> a measure (t5like/evaluation), taken of every run's last checkpoint.
      curve: names of measures that are taken on the way too.
      points: at how many evenly spaced points of a run, its end included, those are taken.
      seeds: each run is trained once for each, with that seed for parameters, data and measures.
      baseline: the run that the others are compared with, seed by seed; None: the first.
      hidden: runs that are not shown, such as those that others start from.
      expected: what was expected before any run was made; printed with the result.
    """

    base: Sequence[str]
    runs: Mapping[str, Sequence[str]]
    measures: Mapping[str, Any]
    tokens: float | None = None
    flops: float | None = None
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve: Sequence[str] = ()
    points: int = 1
    seeds: Sequence[int] = (0, 1, 2)
    baseline: str | None = None
    hidden: Sequence[str] = ()
    expected: str = ""

    def __post_init__(self):
        if (self.tokens is None) == (self.flops is None):
            raise UserError("one budget is needed: set compare.tokens or compare.flops, not both")
        if not self.runs or not self.measures or not self.seeds:
            raise UserError("compare.runs, compare.measures and compare.seeds must not be empty")
        folders: dict[str, str] = {}
        for name in self.runs:
            other = folders.setdefault(folder(name), name)
            if other != name or not folder(name):
                raise UserError(
                    f"compare.runs has {other!r} and {name!r}, whose folders would be called "
                    f"{folder(name)!r} both: name one otherwise"
                )
        for field, names, known in (
            ("factors", self.factors, self.runs),
            ("hidden", self.hidden, self.runs),
            ("baseline", [self.reference], self.runs),
            ("curve", self.curve, self.measures),
        ):
            for name in names:
                if name not in known:
                    raise UserError(
                        f"compare.{field} names {name!r}; there is only {', '.join(known)}"
                    )
        if self.points < 1:
            raise UserError(f"compare.points is {self.points}; it must be at least 1")

    @property
    def reference(self) -> str:
        """The baseline's name."""
        shown = (name for name in self.runs if name not in self.hidden)
        return self.baseline if self.baseline is not None else next(shown)

    def budget(self, name: str) -> tuple[str, float]:
        """("tokens" or "flops", how many) for one run."""
        kind = "tokens" if self.flops is None else "flops"
        return kind, float(getattr(self, kind)) * self.factors.get(name, 1.0)
