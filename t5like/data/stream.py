"""The endless stream of examples: number -> (component, its k-th example) -> (epoch, unit)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5like.data.examples import Example, Record
from t5like.data.mixture import Mixture
from t5like.data.rng import Stream, stream_key
from t5like.data.shuffle import permute
from t5like.data.units import Units, cut

_BLOCKS_KEPT = 64


@dataclasses.dataclass(frozen=True)
class Component:
    """One source of examples of a mixture.

    Attributes:
      name: names its random streams, so it must not change while a run goes on.
      corpus: see t5like/data/units.py for what is asked of it.
      objective: a bound objective; see objectives/base.py (`unit`, `bounds`, `corrupt`).
      rate: how often, relative to the other components, an example is drawn from here.
      order: names the order in which units are read; None: `name`. Phases of a run share one, so
        that a later phase goes on where the earlier one stopped.
    """

    name: str
    corpus: Any
    objective: Any
    rate: float = 1.0
    order: str | None = None

    @property
    def order_name(self) -> str:
        """`order`, resolved."""
        return self.name if self.order is None else self.order


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One example with what it was made of.

    Attributes:
      index: its number in the stream of examples.
      component: where it comes from.
      record: the tokens before corruption.
      example: what the objective made of them.
    """

    index: int
    component: Component
    record: Record
    example: Example


@dataclasses.dataclass(frozen=True)
class Draws:
    """Consecutive examples before anything is read.

    Attributes:
      component, k, unit: int64 [n], each example's component, its number among that component's
        examples, and the unit of the corpus that it is made of.
    """

    component: np.ndarray
    k: np.ndarray
    unit: np.ndarray


class ExampleStream:
    """Examples by number, each a pure function of (components, seed, shuffle, number).

    Attributes:
      components: what is mixed.
      units: each component's corpus, cut as its objective asks.
    """

    def __init__(self, components: Sequence[Component], seed: int, shuffle: bool):
        self.components = components
        self.units: list[Units] = [cut(c.corpus, c.objective.unit) for c in components]
        self._mixture = Mixture(tuple(float(c.rate) for c in components), seed)
        self._seed = seed
        self._shuffle = shuffle
        self._block = functools.lru_cache(_BLOCKS_KEPT)(self._read_block)

    def generators(self, component: int) -> Stream:
        """The randomness of a component's examples; `.at(k)` is that of its k-th."""
        return Stream(self._seed, f"corrupt/{self.components[component].name}")

    def draws(self, start: int, stop: int) -> Draws:
        """Where examples start..stop-1 come from."""
        component, k = self._mixture.locate(start, stop)
        unit = np.empty_like(k)
        for c in np.unique(component).tolist():
            mine = component == c
            unit[mine] = self._unit_numbers(c, k[mine])
        return Draws(component, k, unit)

    def _unit_numbers(self, component: int, k: np.ndarray) -> np.ndarray:
        """int64 [n], the units of the component's k-th examples: every unit once an epoch."""
        count = len(self.units[component])
        epochs, units = np.divmod(k, count)
        if self._shuffle:
            for epoch in np.unique(epochs).tolist():
                name = f"units/{self.components[component].order_name}/{epoch}"
                now = epochs == epoch
                units[now] = permute(units[now], count, stream_key(self._seed, name))
        return units

    def reader(self) -> Callable[[int], Drawn]:
        """A function that reads an example by its number, for the use of one thread."""
        streams = [self.generators(c) for c in range(len(self.components))]
        size = self._mixture.block_size

        def read(index: int) -> Drawn:
            number, at = divmod(index, size)
            components, ks, units = self._block(number)
            c = components[at]
            component = self.components[c]
            record = self.units[c].record(units[at])
            example = component.objective.corrupt(record, streams[c].at(ks[at]))
            return Drawn(index, component, record, example)

        return read

    def _read_block(self, number: int) -> tuple[list[int], list[int], list[int]]:
        size = self._mixture.block_size
        draws = self.draws(number * size, (number + 1) * size)
        return draws.component.tolist(), draws.k.tolist(), draws.unit.tolist()
