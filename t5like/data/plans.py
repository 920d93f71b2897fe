"""step -> (track, the track's batch): which pipeline, loss and compiled update a step belongs to.

A track is what one compiled update trains: one network, one loss, one pipeline. A plan is a pure
function of the step, like the other index maps (see pipeline.py), and knows nothing of what its
tracks are but their names.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np

from t5like.data.mixture import Mixture


@dataclasses.dataclass(frozen=True)
class Plan:
    """Base of all plans."""

    def at(self, step: int) -> tuple[str, int]:
        """The track that a step trains, and the number of the track's batch that it reads."""
        raise NotImplementedError

    def counts(self, step: int) -> dict[str, int]:
        """{track: steps of it before `step`}, every track of the plan named."""
        raise NotImplementedError

    def active(self, step: int) -> tuple[str, ...]:
        """Tracks that are in training when `step` steps are done: those worth evaluating."""
        raise NotImplementedError

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """The same plan with every track called `names[track]`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Always(Plan):
    """One track, which reads batch s at step s.

    Attributes:
      track: its name.
    """

    track: str

    def at(self, step: int) -> tuple[str, int]:
        return self.track, step

    def counts(self, step: int) -> dict[str, int]:
        return {self.track: step}

    def active(self, step: int) -> tuple[str, ...]:
        return (self.track,)

    def renamed(self, names: Mapping[str, str]) -> Plan:
        return Always(names[self.track])


@dataclasses.dataclass(frozen=True)
class Interleaved(Plan):
    """Parts that take turns step by step, at exact rates; each counts its own steps from 0.

    Attributes:
      mixture: step -> (part, the part's step).
      parts: one plan for each of the mixture's rates, with tracks of different names.
    """

    mixture: Mixture
    parts: tuple[Plan, ...]

    def at(self, step: int) -> tuple[str, int]:
        part, own_step = self.mixture.locate(step, step + 1)
        return self.parts[int(part[0])].at(int(own_step[0]))

    def counts(self, step: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        for part, own_step in zip(self.parts, self._own_steps(step), strict=True):
            counts |= part.counts(own_step)
        return counts

    def active(self, step: int) -> tuple[str, ...]:
        own_steps = zip(self.parts, self._own_steps(step), strict=True)
        return tuple(track for part, own_step in own_steps for track in part.active(own_step))

    def renamed(self, names: Mapping[str, str]) -> Plan:
        parts = tuple(part.renamed(names) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    def _own_steps(self, step: int) -> list[int]:
        return steps_of_parts(self.mixture, step)


@dataclasses.dataclass(frozen=True)
class Successive(Plan):
    """Phases: one part after another, each read at the step of the whole run.

    So a phase reads on where the phases before it stopped, if their pipelines share an order.

    Attributes:
      parts: a plan for each phase; equal ones continue the same tracks.
      ends: for each phase but the last, the step at which the next one begins; rising.
    """

    parts: tuple[Plan, ...]
    ends: tuple[int, ...]

    def at(self, step: int) -> tuple[str, int]:
        return self._phase(step).at(step)

    def counts(self, step: int) -> dict[str, int]:
        counts: Counter[str] = Counter()
        starts = (0, *self.ends)
        for part, start, end in zip(self.parts, starts, (*self.ends, step), strict=True):
            start, end = min(start, step), min(end, step)
            counts.update(part.counts(end))
            counts.subtract(part.counts(start))
        return dict(counts)

    def active(self, step: int) -> tuple[str, ...]:
        return self._phase(max(step - 1, 0)).active(step)

    def renamed(self, names: Mapping[str, str]) -> Plan:
        parts = tuple(part.renamed(names) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    def _phase(self, step: int) -> Plan:
        return self.parts[bisect.bisect_right(self.ends, step)]


@dataclasses.dataclass(frozen=True)
class PlannedBatches:
    """The batches of a run of several tracks, as t5like.data.loader.load reads them.

    Attributes:
      pipelines: track -> its t5like.data.pipeline.Pipeline.
      plan: of the whole run.
    """

    pipelines: Mapping[str, object]
    plan: Plan

    def batch(self, step: int, rows: tuple[range, ...] | None = None) -> dict[str, np.ndarray]:
        """What step `step` reads; see Pipeline.batch."""
        track, number = self.plan.at(step)
        return self.pipelines[track].batch(number, rows)


def steps_of_parts(mixture: Mixture, step: int) -> list[int]:
    """How many of the indices 0 .. step - 1 belong to each part of a mixture."""
    start = step // mixture.block_size * mixture.block_size
    counts = mixture.given(step // mixture.block_size)
    if step > start:
        part, _ = mixture.locate(start, step)
        counts = counts + np.bincount(part, minlength=len(counts))
    return counts.tolist()
