"""The text of seqio Tasks and Mixtures, by name. seqio is imported when read."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from t5like.data.sources import files
from t5like.data.sources.base import Document, Source
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class SeqioSource(Source):
    """A Task's text as it stands before the Task tokenises it; a Mixture's tasks one by one.

    The Task's preprocessors run up to the last one that leaves `feature` a string; tokenising
    and corruption are this library's. Rates of a Mixture are not applied (a corpus holds every
    document once): metadata `task` names each document's, to weigh or select by.

    Attributes:
      name: a registered Task or Mixture.
      split: "train", "validation", ...
      feature: the text feature.
      module: a Python module that registers the name, imported first. Without it the name must
        be registered already, and the source is read in this process alone.
    """

    name: str
    split: str = "train"
    feature: str = "targets"
    module: str | None = None

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        seqio = _import_seqio()
        if self.module:
            try:
                importlib.import_module(self.module)
            except ImportError as e:
                raise UserError(f"SeqioSource.module {self.module!r} has no import ({e})") from e
        known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        if self.name not in known:
            near = difflib.get_close_matches(self.name, known, 1)
            mend = f"did you mean {near[0]!r}?" if near else "set SeqioSource.module"
            raise UserError(f"no seqio task or mixture {self.name!r} is registered: {mend}")
        tasks = sorted(seqio.get_subtasks(seqio.get_mixture_or_task(self.name)), key=_name)
        for task in tasks:
            if self.split not in task.splits:
                raise UserError(
                    f"seqio task {task.name!r} has no split {self.split!r}: choose one of "
                    f"{', '.join(task.splits)}"
                )
        return tasks

    @functools.cached_property
    def _pieces(self) -> list[tuple[Any, int, int]]:
        """(Task, shard of it, of how many)."""
        counts = [len(task.source.list_shards(self.split)) for task in self._tasks]
        return [
            (task, i, count)
            for task, count in zip(self._tasks, counts, strict=True)
            for i in range(count)
        ]

    def num_shards(self) -> int:
        return len(self._pieces) if self.module else 1

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        count = len(self._pieces)
        for task, index, total in self._pieces[
            count * shard // num_shards : count * (shard + 1) // num_shards
        ]:
            for text in self._text(task, index, total).as_numpy_iterator():
                yield Document(text.decode("utf-8", "replace"), {"task": task.name})

    def _text(self, task: Any, index: int, total: int) -> Any:
        """A tf.data.Dataset of the feature's strings."""
        seqio = _import_seqio()
        info = seqio.ShardInfo(index=index, num_shards=total)
        dataset = task.source.get_dataset(split=self.split, shuffle=False, shard_info=info)
        text = self._strings(dataset)
        steps = [s for s in task.preprocessors if not isinstance(s, seqio.CacheDatasetPlaceholder)]
        with seqio.map_seed_manager(0):
            for step in steps:
                dataset = _apply(step, dataset, task.output_features)
                strings = self._strings(dataset)
                if text is not None and strings is None:
                    return text
                text = strings
        if text is None:
            found = ", ".join(sorted(dataset.element_spec))
            raise UserError(
                f"seqio task {task.name!r} has no text feature {self.feature!r} (it ends with "
                f"{found}): set SeqioSource.feature"
            )
        return text

    def _strings(self, dataset: Any) -> Any | None:
        spec = dataset.element_spec
        spec = spec.get(self.feature) if isinstance(spec, dict) else None
        if spec is None or spec.dtype.name != "string" or spec.shape.rank:
            return None
        return dataset.map(lambda example: example[self.feature])

    @functools.cached_property
    def _fingerprint(self) -> str:
        sizes = [(task.name, task.num_input_examples(self.split)) for task in self._tasks]
        return files.settings_hash("SeqioSource", self.name, self.split, self.feature, sizes)

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _name(task: Any) -> str:
    return task.name


def _apply(step: Any, dataset: Any, output_features: Any) -> Any:
    """Runs one preprocessor with what seqio would give it besides the dataset."""
    accepted = inspect.signature(step).parameters
    given = {"sequence_length": None, "output_features": output_features}
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return step(dataset, **{k: v for k, v in given.items() if anything or k in accepted})


def _import_seqio() -> Any:
    try:
        import seqio
    except ImportError as e:
        raise UserError(f"SeqioSource needs seqio ({e}): pip install t5like[all]") from e
    return seqio
