"""Several objectives in one run, at fixed rates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from objectives.base import Objective
from objectives.composite import Composite
from t5like.data import mixture as interleaving
from t5like.data.plans import Interleaved, Plan, steps_of_parts
from t5like.data.rng import stream_key
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Composite):
    """Draws from several objectives at fixed rates (UL2's mixing, Tay et al. 2023, section 3.1.2).

    Objectives that have one network and loss (`device_key`) and one shape of batch are mixed
    example by example and trained by one update; the others take turns batch by batch, each with
    an update of its own. Both kinds of turns are exact: after n examples (or batches) an
    objective of rate r has had r * n of them, within a block of 1,024, in a shuffled order.

    Rates count examples or batches, not tokens: an objective with more targets an example weighs
    more in the sum that is its loss. Of a state's parameters, a batch's update touches those of
    its objective's network only; the optimiser's count is the step of the run, so that the bias
    correction of a head's moments is that of a head trained all along.

    Otherwise than the reference: UL2 mixes seqio tasks by sampling; here rates are exact.

    Attributes:
      objectives: {name: objective}; names are free, and appear in logs.
      rates: {name: rate} above 0, relative to each other; equal when None.
    """

    objectives: Mapping[str, Objective]
    rates: Mapping[str, float] | None = None

    def __post_init__(self):
        if not isinstance(self.objectives, Mapping) or not self.objectives:
            raise UserError(
                f"Mixture.objectives is {self.objectives!r}; bind it to a dict such as "
                "{'clm': @CausalLM(), 'mlm': @MaskedLM()}"
            )
        for name, objective in self.objectives.items():
            if not isinstance(objective, Objective):
                raise UserError(
                    f"Mixture.objectives[{name!r}] is {objective!r}; write @Name() of an objective"
                )
            if not isinstance(name, str) or set("/+") & set(name) or not name:
                raise UserError(
                    f"Mixture.objectives has the name {name!r}; use one without '/' and '+'"
                )
        rates = self.rates
        if rates is not None and set(rates) != set(self.objectives):
            raise UserError(
                f"Mixture.rates names {sorted(rates)}, and Mixture.objectives "
                f"{sorted(self.objectives)}: give one rate for each"
            )
        for name, rate in (rates or {}).items():
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(
                    f"Mixture.rates[{name!r}] is {rate}; make it more than 0, or take "
                    f"{name!r} out of Mixture.objectives and Mixture.rates"
                )

    @property
    def parts(self) -> Sequence[Objective]:
        return tuple(self.objectives.values())

    def with_parts(self, change: Callable[[Objective], Objective]) -> Self:
        changed = {name: change(part) for name, part in self.objectives.items()}
        return dataclasses.replace(self, objectives=changed)

    # --- tracks ---

    def tracks(self) -> dict[str, Objective]:
        """Of one track: its group's name; of several: the part's name, "/" and the track's."""
        tracks: dict[str, Objective] = {}
        for name, group in self._groups.items():
            own = group.tracks()
            tracks |= {_joined(name, track, own): objective for track, objective in own.items()}
        return tracks

    def plan(self, total_steps: int, seed: int) -> Plan:
        groups = self._groups
        names = tuple(groups)
        if len(names) == 1:
            return self._part_plan(names[0], total_steps, seed)
        rates = tuple(self._rate(name) for name in names)
        turns = interleaving.Mixture(rates, stream_key(seed, f"turns/{'+'.join(names)}"))
        steps = steps_of_parts(turns, total_steps)
        parts = (self._part_plan(n, t, seed) for n, t in zip(names, steps, strict=True))
        return Interleaved(turns, tuple(parts))

    def reading_orders(self) -> dict[str, str]:
        orders: dict[str, str] = {}
        for name, group in self._groups.items():
            own = group.tracks()
            for track, order in group.reading_orders().items():
                orders[_joined(name, track, own)] = f"{name}/{order}"
        return orders

    def _part_plan(self, name: str, total_steps: int, seed: int) -> Plan:
        group = self._groups[name]
        own = group.tracks()
        plan = group.plan(total_steps, seed)
        return plan.renamed({track: _joined(name, track, own) for track in own})

    def _rate(self, group: str) -> float:
        rates = self.rates or dict.fromkeys(self.objectives, 1.0)
        return math.fsum(rates[name] for name in group.split("+"))

    @functools.cached_property
    def _groups(self) -> dict[str, Objective]:
        """What takes turns batch by batch: parts, and groups of parts mixed by example (a+b)."""
        groups: list[tuple[Any, dict[str, Objective]]] = []
        for name, part in self.objectives.items():
            key = _batch_key(part)
            for other, members in groups:
                if key is not None and key == other:
                    members[name] = part
                    break
            else:
                groups.append((key, {name: part}))
        return {"+".join(members): self._group(members) for _, members in groups}

    def _group(self, members: dict[str, Objective]) -> Objective:
        if len(members) == 1:
            return next(iter(members.values()))
        weighted = {}
        for name, part in members.items():
            [only] = part.tracks().values()
            weighted[name] = (only, self._rate(name))
        return _ByExample(weighted=weighted, setting=self.setting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByExample(Composite):
    """Objectives that share their batches; which one made an example, only the host knows.

    Attributes:
      weighted: {name: (objective, rate)}, all of one `device_key` and shape of batch.
    """

    weighted: Mapping[str, tuple[Objective, float]]

    @property
    def parts(self) -> Sequence[Objective]:
        return tuple(part for part, _ in self.weighted.values())

    def with_parts(self, change: Callable[[Objective], Objective]) -> Self:
        changed = {name: (change(part), rate) for name, (part, rate) in self.weighted.items()}
        return dataclasses.replace(self, weighted=changed)

    def components(self) -> dict[str, tuple[Objective, float]]:
        found = {}
        for name, (part, rate) in self.weighted.items():
            own = part.components()
            total = math.fsum(own_rate for _, own_rate in own.values())
            for component, (objective, own_rate) in own.items():
                joined = name if len(own) == 1 else f"{name}/{component}"
                found[joined] = (objective, rate * own_rate / total)
        return found

    @property
    def features(self) -> tuple[str, ...]:
        return self._leader.features

    @property
    def members(self) -> int:
        return self._leader.members

    @property
    def _leader(self) -> Objective:
        """The part whose `usual_predictions` are enough for the rows of all."""
        predictions = [part.usual_predictions for part in self.parts]
        if None in predictions:
            return self.parts[predictions.index(None)]
        return self.parts[predictions.index(max(predictions))]

    def network(self, config: Any) -> Any:
        return self._leader.network(config)

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        return self._leader.losses(apply, params, frozen, batch, rng, train)

    def frozen(self, config: Any) -> Any | None:
        return self._leader.frozen(config)

    @property
    def device_key(self) -> Any:
        return self._leader.device_key

    @property
    def usual_predictions(self) -> int | None:
        return self._leader.usual_predictions

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        return self._leader.train_flops(config, spec)


def _batch_key(part: Objective) -> Any | None:
    """Equal where parts can share a batch; None where a part has several kinds of batches."""
    tracks = part.tracks()
    if len(tracks) > 1:
        return None
    [only] = tracks.values()
    return only.device_key, only.lengths, only.features, only.members


def _joined(name: str, track: str, tracks: Mapping[str, Any]) -> str:
    return name if len(tracks) == 1 else f"{name}/{track}"
