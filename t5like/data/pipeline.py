"""batch(step): a pure function of (seed, step), whoever asks for it and in whatever order.

Three index maps and no state:
  step -> rows (arithmetic); row -> examples (t5like/data/packing.py, or one to one);
  example -> (component, epoch, unit) (t5like/data/stream.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5like.data import layout
from t5like.data.examples import Document, Example, Lengths
from t5like.data.packing import PackedRows
from t5like.data.stream import Component, Drawn, ExampleStream
from t5like.errors import UserError

__all__ = ["Component", "Drawn", "Pipeline"]

_GROUP = 2048
# Part of the packing cache's name: raise it when an index map changes its results.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Corpora and objectives -> batches.

    Attributes:
      components: what is mixed.
      vocabulary: `pad_id`, `bos_id` and `fingerprint()` are used.
      architecture, length, targets_length, attend_across_documents: see layout.lay_out.
      batch_size: rows of a global batch.
      seed: seed of everything random.
      pack: whether a row holds as many examples as fit, or one.
      shuffle: whether each epoch has its own order of units, or the corpus's.
      cache_dir: where packing keeps its row counts (a local directory), or None.

    Raises:
      UserError: an empty component, two of one name, or examples that can never fit a row.
    """

    components: Sequence[Component]
    _: dataclasses.KW_ONLY
    vocabulary: Any
    architecture: str
    length: int
    targets_length: int | None = None
    batch_size: int
    seed: int
    pack: bool = False
    attend_across_documents: bool = True
    shuffle: bool = True
    cache_dir: Any = None

    def __post_init__(self):
        _ = self._members
        names = [c.name for c in self.components]
        if len(set(names)) < len(names):
            raise UserError(f"two data components have one name: {', '.join(names)}; rename one")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")
        for c, component in enumerate(self.components):
            if not len(self._stream.units[c]):
                raise UserError(
                    f"the corpus of {component.name!r} has no tokens; check its source's paths"
                )
            unit = component.objective.unit
            longest = unit.max_raw_length if isinstance(unit, Document) else unit.raw_length
            rng = self._stream.generators(c).at(0)
            self._check(component, longest, component.objective.bounds(longest, rng))

        apart = not self.attend_across_documents
        for component in self.components:
            if apart and not getattr(component.objective, "keeps_documents_apart", True):
                raise UserError(
                    f"{component.name!r} makes spans that cross documents, which "
                    "train.attend_across_documents=False cannot keep apart: set its cut to "
                    "'document' (and train.pack = True)"
                )

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _stream(self) -> ExampleStream:
        return ExampleStream(self.components, self.seed, self.shuffle)

    # --- batches ---

    def batch(self, step: int, rows: tuple[range, ...] | None = None) -> dict[str, np.ndarray]:
        """Rows of the global batch of `step`.

        Args:
          rows: ranges of 0 .. batch_size - 1, in the order in which they are wanted; None: all.

        Returns:
          {feature: [B, L]}, B the number of rows; see `spec`.

        Raises:
          ValueError: an example fits no row.
        """
        start = step * self.batch_size
        examples = []
        for part in self._ranges(rows):
            examples += self._examples_of_rows(start + part.start, start + part.stop)
        return self._lay_out(examples)

    def one_pass(
        self, limit: int | None = None, rows: tuple[range, ...] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of one pass, for evaluation; empty rows fill the last one.

        One corpus is covered exactly once. Of a mixture there are as many examples as cover it in
        sum at its rates: a corpus that is drawn more than its share of units begins again, and of
        one that is drawn less, some units are not seen.

        Args:
          limit: most batches, None for all.
          rows: see `batch`. However few, there are as many batches as of all rows.
        """
        rows = self._ranges(rows)
        examples = self._rows_of_a_pass()
        for _ in range(limit) if limit is not None else itertools.count():
            chosen = list(itertools.islice(examples, self.batch_size))
            if not chosen:
                return
            chosen += [[]] * (self.batch_size - len(chosen))
            yield self._lay_out([chosen[row] for part in rows for row in part])

    def _ranges(self, rows: tuple[range, ...] | None) -> tuple[range, ...]:
        whole = range(self.batch_size)
        if rows is None:
            return (whole,)
        for part in rows:
            if part.step != 1 or not part or part[0] not in whole or part[-1] not in whole:
                raise ValueError(f"rows {part} of a batch of {self.batch_size}")
        return rows

    def _rows_of_a_pass(self) -> Iterator[list[int]]:
        """Examples of each row, of as many examples as there are units (by rate, in a mixture)."""
        rates = sum(c.rate for c in self.components)
        shares = [
            c.rate / rates / len(units)
            for c, units in zip(self.components, self._stream.units, strict=True)
        ]
        count = round(1 / sum(shares))
        if not self.pack:
            yield from ([index] for index in range(count))
            return
        for group in range(-(-count // self._group_size)):
            for row in self._packed.rows(group):
                kept = [int(i) for i in row + group * self._group_size if i < count]
                if kept:
                    yield kept

    def _lay_out(self, indices: list[list[int]]) -> dict[str, np.ndarray]:
        """A batch of rows, each given as the numbers of its examples."""
        read = self._stream.reader()
        try:
            return self.lay_out([[read(index).example for index in row] for row in indices])
        except layout.LayoutError as error:
            index = indices[error.row][error.example]
            name = read(index).component.name
            raise ValueError(f"example {index} (of {name!r}): {error.reason}") from None

    def lay_out(self, rows: list[list[Example]]) -> dict[str, np.ndarray]:
        """{feature: [len(rows), L]} of examples that are given, as batches of them would be."""
        return layout.lay_out(
            rows,
            architecture=self.architecture,
            length=self.length,
            targets_length=self.targets_length,
            bos_id=self.vocabulary.bos_id,
            pad_id=self.vocabulary.pad_id,
            attend_across_documents=self.attend_across_documents,
            features=self._features,
            members=self._members,
            sees_ahead=self._sees_ahead,
        )

    def spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{feature: (shape, dtype)} of a global batch."""
        return layout.spec(
            self.architecture, self.batch_size, self.length, self.targets_length,
            self._features, self._members, self._sees_ahead,
        )  # fmt: skip

    @functools.cached_property
    def _features(self) -> tuple[str, ...]:
        """Further features that any of the objectives asks for."""
        asked = (getattr(c.objective, "features", ()) for c in self.components)
        return tuple(dict.fromkeys(itertools.chain.from_iterable(asked)))

    @functools.cached_property
    def _sees_ahead(self) -> bool:
        """Whether any of the objectives lets slots of a decoder see later ones."""
        return any(getattr(c.objective, "sees_ahead", False) for c in self.components)

    @functools.cached_property
    def _members(self) -> int:
        """Members of an example, of one number in all components."""
        numbers = {getattr(c.objective, "members", 1) for c in self.components}
        if len(numbers) > 1:
            names = ", ".join(c.name for c in self.components)
            raise UserError(
                f"{names} cannot share batches: their examples have {sorted(numbers)} members; "
                "mix them per batch, with @Mixture()"
            )
        return numbers.pop()

    def examples(self, start: int = 0) -> Iterator[Drawn]:
        """The endless stream of examples, from number `start`."""
        yield from map(self._stream.reader(), itertools.count(start))

    @staticmethod
    def hash(batch: Mapping[str, np.ndarray]) -> str:
        """A digest of names, dtypes, shapes and contents, the same on every machine."""
        return Pipeline.hash_of(Pipeline.row_hashes(batch))

    @staticmethod
    def row_hashes(batch: Mapping[str, np.ndarray]) -> list[str]:
        """The digest of each row of a batch {feature: [B, ...]}, or of a part of one."""
        arrays = {name: np.ascontiguousarray(batch[name]) for name in sorted(batch)}
        found = []
        for row in range(min(map(len, arrays.values()), default=0)):
            digest = hashlib.blake2b(digest_size=16)
            for name, array in arrays.items():
                digest.update(f"{name} {array.dtype.str} {array.shape[1:]}\n".encode())
                digest.update(array[row].tobytes())
            found.append(digest.hexdigest())
        return found

    @staticmethod
    def hash_of(row_hashes: Iterable[str]) -> str:
        """The digest of a batch whose rows, in order, have these."""
        return hashlib.blake2b(" ".join(row_hashes).encode(), digest_size=16).hexdigest()

    # --- row -> examples ---

    def _examples_of_rows(self, start: int, stop: int) -> list[list[int]]:
        if not self.pack:
            return [[index] for index in range(start, stop)]
        rows: list[list[int]] = []
        while start < stop:
            group, at = self._packed.locate(start)
            taken = self._packed.rows(group)[at : at + stop - start]
            rows += [(row + group * self._group_size).tolist() for row in taken]
            start += len(taken)
        return rows

    @property
    def _group_size(self) -> int:
        """Examples packed together; more for long rows, whose last one weighs more."""
        return _GROUP * max(1, self.length // 4096)

    @functools.cached_property
    def _packed(self) -> PackedRows:
        targets = self.targets_length if self.architecture == "encoder_decoder" else 0
        cache = None
        if self.cache_dir is not None:
            cache = pathlib.Path(self.cache_dir) / f"packed_rows_{self._fingerprint()}.bin"
        return PackedRows(
            self._sizes, self._group_size, (self.length, targets or 0), self.seed, cache
        )

    def _sizes(self, group: int) -> np.ndarray:
        """int64 [group_size, 2], bounds of the group's examples on both sides of a row."""
        size = self._group_size
        draws = self._stream.draws(group * size, (group + 1) * size)
        bounds = np.zeros((size, 2), np.int64)
        for c, component in enumerate(self.components):
            mine = np.flatnonzero(draws.component == c)
            generators = self._stream.generators(c)
            lengths = self._stream.units[c].raw_lengths(draws.unit[mine]).tolist()
            for i, k, length in zip(mine.tolist(), draws.k[mine].tolist(), lengths, strict=True):
                bound = component.objective.bounds(length, generators.at(k))
                bounds[i] = self._check(component, length, bound)
        return bounds

    def _check(self, component: Component, raw_length: int, bound: Lengths) -> tuple[int, int]:
        """The bound as (first side, second side); UserError if it exceeds the row."""
        if self.architecture == "encoder_decoder":
            sides, room = (bound.inputs, bound.targets), (self.length, self.targets_length)
        else:
            sides, room = (bound.inputs + bound.targets, 0), (self.length, 0)
        if sides[0] > room[0] or sides[1] > room[1]:
            raise UserError(
                f"{component.name!r} makes up to {bound.inputs} inputs and {bound.targets} targets "
                f"from {raw_length} tokens, more than a row holds (length {self.length}, "
                f"targets_length {self.targets_length}): raise those lengths or shorten its unit"
            )
        return sides

    def _fingerprint(self) -> str:
        """Identifies all that the packing plan depends on."""
        parts = [_VERSION, self.seed, self.architecture, self.length, self.targets_length]
        parts += [self.shuffle, self._group_size, self.vocabulary.fingerprint()]
        parts += [
            (c.name, c.order_name, c.corpus.fingerprint, c.objective, c.rate)
            for c in self.components
        ]
        return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
