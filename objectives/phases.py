"""Objectives one after another in one run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Self

from objectives.base import Objective
from objectives.composite import Composite
from t5like.data.plans import Plan, Successive
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases(Composite):
    """Trains one objective, then another, such as a causal and then a masked language model.

    The biphasic recipe ("Should We Still Pretrain Encoders with Masked Language Modeling?",
    Gisserot-Boukhlef et al. 2025, arXiv 2507.00994): causal for 25% or 50% of a run, masked for
    the rest, from a checkpoint whose learning rate has not decayed. With warmup-stable-decay the
    rate at the switch is the peak, and decays once, at the very end. The loss jumps at the switch;
    log lines name each phase's terms apart.

    A phase reads on in its corpus where the phases before it stopped, in the order that they all
    share, if it draws from it as they do: one component, and units of one size (a vocabulary with
    [CLS] and [SEP] makes MaskedLM's windows shorter; then documents may come twice in an epoch).
    A phase that returns to an objective of an earlier one goes on with that one's compiled update.

    Otherwise than the reference: the two phases are one run with one optimiser's state, where the
    paper resumes a checkpoint and does not say what becomes of its state.

    Attributes:
      phases: the objectives, in order; equal ones are one.
      until: where each phase but the last ends: a fraction f of the run, 0 < f < 1 (it ends
        before step floor(f * total steps)), or a step, an int.
    """

    phases: Sequence[Objective]
    until: Sequence[int | float]

    def __post_init__(self):
        if not isinstance(self.phases, Sequence) or not self.phases:
            raise UserError(
                f"Phases.phases is {self.phases!r}; bind it to a list such as "
                "[@CausalLM(), @MaskedLM()]"
            )
        kept: list[Objective] = []
        for phase in self.phases:
            if not isinstance(phase, Objective):
                raise UserError(f"Phases.phases has {phase!r}; write @Name() of an objective")
            # Equal phases become one object, which all below knows them by.
            same = (p for p in kept if p is phase or (phase.setting is None and p == phase))
            kept.append(next(same, phase))
        object.__setattr__(self, "phases", tuple(kept))
        if not isinstance(self.until, Sequence) or len(self.until) != len(self.phases) - 1:
            raise UserError(
                f"Phases.until is {self.until!r}; {len(self.phases)} phases need "
                f"{len(self.phases) - 1} ends (the last phase ends with the run)"
            )
        for end in self.until:
            if not (_is_fraction(end) or (type(end) is int and end > 0)):
                raise UserError(
                    f"Phases.until has {end!r}; write a fraction of the run between 0 and 1, or a "
                    "step (a whole number above 0)"
                )
        for before, after in itertools.pairwise(self.until):
            if _is_fraction(before) == _is_fraction(after) and before >= after:
                raise UserError(f"Phases.until is {self.until!r}; its ends must rise")

    @property
    def parts(self) -> Sequence[Objective]:
        """The last phase first: it is what a trained model did last."""
        return tuple(reversed(self.phases))

    @property
    def reads_in_place(self) -> bool:
        """As the last phase taught it."""
        return self.parts[0].reads_in_place

    def with_parts(self, change: Callable[[Objective], Objective]) -> Self:
        changed = {number: change(self.phases[number]) for number in dict.fromkeys(self._firsts)}
        return dataclasses.replace(self, phases=[changed[first] for first in self._firsts])

    # --- tracks ---

    def tracks(self) -> dict[str, Objective]:
        """Named by class, with _2, _3 ... where phases of one class differ."""
        return {
            self._names[number][track]: objective
            for number in self._names
            for track, objective in self.phases[number].tracks().items()
        }

    def plan(self, total_steps: int, seed: int) -> Plan:
        parts = [
            self.phases[first].plan(total_steps, seed).renamed(self._names[first])
            for first in self._firsts
        ]
        return Successive(tuple(parts), self.ends(total_steps))

    def reading_orders(self) -> dict[str, str]:
        orders: dict[str, str] = {}
        for number, names in self._names.items():
            phase = self.phases[number]
            own = phase.reading_orders()
            if len(names) == len(phase.components()) == 1:
                own = dict.fromkeys(names, "phases")
            orders |= {names[track]: order for track, order in own.items()}
        return orders

    def ends(self, total_steps: int) -> tuple[int, ...]:
        """The steps at which phases but the first begin, in a run of total_steps.

        A step and a fraction may come in the wrong order; then the phase between them is empty.
        """
        # Exact: 0.29 of 100 steps are 29, though 0.29 * 100 is less.
        ends = (
            math.floor(Fraction(str(end)) * total_steps) if _is_fraction(end) else end
            for end in self.until
        )
        return tuple(itertools.accumulate(ends, max))

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """For each phase, the number of the first phase that is the same."""
        return [
            next(first for first, other in enumerate(self.phases) if other is phase)
            for phase in self.phases
        ]

    @functools.cached_property
    def _names(self) -> dict[int, dict[str, str]]:
        """Number of a phase not seen before -> {its own name of a track: the name in this run}."""
        taken: set[str] = set()
        names: dict[int, dict[str, str]] = {}
        for number in dict.fromkeys(self._firsts):
            names[number] = {}
            for track in self.phases[number].tracks():
                free = (f"{track}_{n}" if n > 1 else track for n in itertools.count(1))
                names[number][track] = next(name for name in free if name not in taken)
                taken.add(names[number][track])
        return names


def _is_fraction(end: Any) -> bool:
    return isinstance(end, float) and 0 < end < 1
