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

    @property
    def reads_in_place(self) -> bool:
        return any(part.reads_in_place for part in self.parts)

    @property
    def sees_ahead(self) -> bool:
        return any(part.sees_ahead for part in self.parts)

    def infilling(self) -> Any | None:
        return _first(part.infilling() for part in self.parts)

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Example | None:
        return _first(part.continuation(prefix, rest) for part in self.parts)


def _check_meanings(parts: Sequence[Objective], vocabulary: Any) -> None:
    """Raises UserError where a sentinel marks spans for one objective and has a name for another.

    Each objective sees by itself that its own do not clash.
    """
    leaves = list(itertools.chain.from_iterable(map(_leaves, parts)))
    named = {
        token: (name, type(leaf).__name__)
        for leaf in leaves
        for token, name in leaf.named_tokens.items()
        if name in PLACES
    }
    for leaf in leaves:
        for component, _ in leaf.components().values():
            form = component.infilling()
            marks = [] if form is None else form.marks.tolist()
            for name, other in (named[mark] for mark in marks if mark in named):
                raise UserError(
                    f"{type(leaf).__name__} marks its spans with a sentinel that is {name} to "
                    f"{other}: raise {type(vocabulary).__name__}.extra_ids to "
                    f"{len(marks) + len(PLACES)}"
                )


def _leaves(part: Objective) -> Sequence[Objective]:
    """The objectives that are not made of others."""
    if not isinstance(part, Composite):
        return [part]
    return list(itertools.chain.from_iterable(map(_leaves, part.parts)))


def _first(answers: Iterator[Any]) -> Any | None:
    """The first answer there is."""
    return next((answer for answer in answers if answer is not None), None)
