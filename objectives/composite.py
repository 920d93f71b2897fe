"""What objectives that are made of others share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from objectives.base import Objective, Setting
from objectives.special_tokens import PLACES
from t5like.data.examples import Example, Lengths
from t5like.errors import UserError


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
        _check_meanings(bound.parts, setting.vocabulary)
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


def _check_meanings(parts: Sequence[Objective], vocabulary: Any) -> None:
    """Raises UserError where a sentinel marks spans for one part and has a name for another."""
    named = [{i: n for i, n in part.named_tokens.items() if n in PLACES} for part in parts]
    for spans, names in itertools.permutations(range(len(parts)), 2):
        form = parts[spans].infilling()
        clash = [names_of for i, names_of in named[names].items() if form and i in form.marks]
        if clash:
            least = len(form.marks) + len(PLACES)
            raise UserError(
                f"{type(parts[spans]).__name__} marks its spans with a sentinel that is {clash[0]} "
                f"to {type(parts[names]).__name__}: raise {type(vocabulary).__name__}.extra_ids to "
                f"{least}"
            )


def _first(answers: Iterator[Any]) -> Any | None:
    """The first answer there is."""
    return next((answer for answer in answers if answer is not None), None)
