"""CompareConfig: what is compared, under which budget and by which measures, as gin's `compare`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5like.errors import UserError


def folder(name: str) -> str:
    """The folder of a run: its name with a dash for all but letters, digits, "." and "_"."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")


def _not_list(value: Any, kind: type) -> bool:
    """Whether a value is no list or tuple of such values."""
    return not isinstance(value, (list, tuple)) or not all(isinstance(x, kind) for x in value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison. gin calls it `compare`: `--gin.compare.seeds=[0]`.

    A run is described as a user would on the command line: pages, and bindings 'NAME = VALUE'.
    `{NAME}` in a binding stands for the workdir of the run NAME of the same seed, so that a run
    can go on from another one ("train.init_from = '{start}'"), which must be listed before it;
    `{seed}` stands for the seed. A run that goes on with the data that another one began with
    should draw it anew ("train.seed = 100{seed}").

    Attributes:
      base: pages and bindings that all runs begin with.
      runs: name -> what comes after `base`.
      tokens, flops: the budget of each run, one of them; see t5like/training/budget.py.
      factors: name -> factor on the budget, for controls and for runs that others start from.
      measures: name -> a measure (t5like/evaluation), taken of the last checkpoint of every run
        that is shown.
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
        self._check_kinds()
        folders: dict[str, str] = {}
        for name in self.runs:
            other = folders.setdefault(folder(name), name)
            if other != name:
                raise UserError(
                    f"compare.runs has {other!r} and {name!r}, whose folders would be called "
                    f"{folder(name)!r} both: name one otherwise"
                )
        for field, names, known in (
            ("factors", self.factors, self.runs),
            ("hidden", self.hidden, self.runs),
            ("baseline", [self.reference], [name for name in self.runs if name not in self.hidden]),
            ("curve", self.curve, self.measures),
        ):
            for name in names:
                if name not in known:
                    raise UserError(
                        f"compare.{field} names {name!r}; there is only {', '.join(known)}"
                    )
        if self.points < 1:
            raise UserError(f"compare.points is {self.points}; it must be at least 1")

    def _check_kinds(self) -> None:
        """Raises UserError where a field is not what its name says."""
        for field in ("runs", "measures"):
            value = getattr(self, field)
            if not isinstance(value, Mapping) or not value:
                raise UserError(f"compare.{field} is {value!r}; bind it to a dict {{'NAME': ...}}")
            for name in value:
                if not isinstance(name, str) or not folder(name) or set("/|") & set(name):
                    raise UserError(
                        f"compare.{field} has the name {name!r}; use letters and digits, no / or |"
                    )
        if _not_list(self.seeds, int) or not self.seeds:
            raise UserError(f"compare.seeds is {self.seeds!r}; bind it to a list such as [0, 1, 2]")
        for field, entries in (("base", self.base), *self.runs.items()):
            where = "compare.base" if entries is self.base else f"compare.runs[{field!r}]"
            if _not_list(entries, str):
                raise UserError(
                    f"{where} is {entries!r}; write a list of pages and bindings, such as "
                    "['objectives/mlm.gin', 'train.length = 64']"
                )
            for entry in entries:
                if re.match(r"train\.(steps|tokens|flops)\b", entry.strip()):
                    raise UserError(
                        f"{where} has {entry!r}, but the budget is one for all: set compare.tokens "
                        "or compare.flops, and compare.factors for a run that is to have more"
                    )
        for name, measure in self.measures.items():
            if not callable(getattr(measure, "measure", None)) or inspect.isclass(measure):
                raise UserError(
                    f"compare.measures[{name!r}] is {measure!r}; write @Name() of a measure, such "
                    "as @LinearProbe()"
                )

    @property
    def reference(self) -> str:
        """The baseline's name."""
        shown = (name for name in self.runs if name not in self.hidden)
        return self.baseline if self.baseline is not None else next(shown, "")

    def budget(self, name: str) -> tuple[str, float]:
        """("tokens" or "flops", how many) for one run."""
        kind = "tokens" if self.flops is None else "flops"
        return kind, float(getattr(self, kind)) * self.factors.get(name, 1.0)
