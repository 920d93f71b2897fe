"""What objectives that are made of others share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from objectives.base import Objective, Setting
from t5like.data.examples import Example, Lengths


@dataclasses.dataclass(frozen=True)
class Composite(Objective):
    """Base of objectives made of others; what a trained model can do is what any of them taught."""

    @property
    def parts(self) -> Sequence[Objective]:
        """The objectives that this is made of; whom to ask first comes first."""
        raise NotImplementedError

    def with_parts(self, change: Callable[[Objective], Objective]) -> Self:
        """A copy with every part changed."""
        raise NotImplementedError

    def bind(self, setting: Setting) -> Self:
        bound = self.with_parts(lambda part: part.bind(setting))
        return dataclasses.replace(bound, setting=setting)

    def evaluation(self) -> Self:
        return self.with_parts(lambda part: part.evaluation())

    def components(self) -> Mapping[str, tuple[Objective, float]]:
        """Those of all parts; their rates hold within a part only."""
        return dict(itertools.chain.from_iterable(p.components().items() for p in self.parts))

    @property
    def lengths(self) -> Lengths:
        """The longest of any part."""
        lengths = [part.lengths for part in self.parts]
        return Lengths(max(x.inputs for x in lengths), max(x.targets for x in lengths))

    @property
    def named_tokens(self) -> Mapping[int, str]:
        named: dict[int, str] = {}
        for part in self.parts:
            named |= part.named_tokens
        return named

    @property
    def reads_both_ways(self) -> bool:
        return any(part.reads_both_ways for part in self.parts)

    def infilling(self) -> Any | None:
        return _first(part.infilling() for part in self.parts)

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Example | None:
        return _first(part.continuation(prefix, rest) for part in self.parts)


def _first(answers: Iterator[Any]) -> Any | None:
    """The first answer there is."""
    return next((answer for answer in answers if answer is not None), None)
