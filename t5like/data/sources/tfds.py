"""TensorFlow Datasets, by name or as prepared directories. TensorFlow is imported when read."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from t5like.data.sources import files
from t5like.data.sources.base import Document, Source
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """A split of a prepared dataset.

    Attributes:
      name: a tfds name such as "c4/en:3.0.1", or a prepared directory (one that holds
        dataset_info.json; the old layout without features.json too).
      split: "train", "validation", ...
      data_dir: where tfds looks for the name; None is its default. Nothing is downloaded.
      text_field: the feature that holds the text.
      metadata_fields: scalar features kept as metadata.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    text_field: str = "text"
    metadata_fields: Sequence[str] = ()

    @functools.cached_property
    def _reader(self) -> _Builder | _Records:
        folder = epath.Path(self.name)
        if not (folder / "dataset_info.json").exists():
            return _Builder(_builder_by_name(self.name, self.data_dir), self.split)
        if (folder / "features.json").exists():
            builder = _import_tfds().builder_from_directory(str(folder))
            return _Builder(builder, self.split)
        return _Records(folder, self.split)

    def num_shards(self) -> int:
        return self._reader.num_shards()

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        for record in self._reader.records(shard, num_shards):
            for name in (self.text_field, *self.metadata_fields):
                if name not in record:
                    raise UserError(f"{self.name}: {_no_feature(name, record)}")
            metadata = {name: _plain(record[name]) for name in self.metadata_fields}
            text = _plain(record[self.text_field])
            if not isinstance(text, str):
                raise UserError(f"{self.name}: feature {self.text_field!r} is no text: {text!r}")
            yield Document(text, metadata)

    @functools.cached_property
    def _fingerprint(self) -> str:
        fields = (self.text_field, tuple(self.metadata_fields))
        return files.settings_hash("TfdsSource", self.split, fields, self._reader.identity())

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class _Builder:
    """Reads a dataset that tfds itself understands, by slices of its examples."""

    def __init__(self, builder: Any, split: str):
        self._builder, self._split = builder, split
        if split not in builder.info.splits:
            raise UserError(_no_split(builder.info.full_name, split, builder.info.splits))
        self._info = builder.info.splits[split]

    def num_shards(self) -> int:
        return self._info.num_shards

    def records(self, shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
        tfds = _import_tfds()
        count = self._info.num_examples
        low, high = count * shard // num_shards, count * (shard + 1) // num_shards
        if low == high:
            return
        part = tfds.core.ReadInstruction(self._split, from_=low, to=high, unit="abs")
        # One file after the other: an interleaved read depends on how it is sliced.
        order = tfds.ReadConfig(interleave_cycle_length=1)
        dataset = self._builder.as_dataset(split=part, shuffle_files=False, read_config=order)
        yield from tfds.as_numpy(dataset)

    def identity(self) -> tuple:
        return (self._builder.info.full_name, self._info.num_examples, self._info.num_bytes)


class _Records:
    """Reads TFRecord files of tf.train.Example, the layout before features.json."""

    def __init__(self, folder: epath.Path, split: str):
        found = [path for path in sorted(folder.iterdir()) if ".tfrecord-" in path.name]
        splits = sorted({re.split(r"\.tfrecord-", p.name)[0].split("-", 1)[-1] for p in found})
        mine = [p for p in found if f"-{split}.tfrecord-" in p.name]
        if not mine:
            raise UserError(_no_split(folder, split, splits))
        self._files = files.expand([str(path) for path in mine])

    def num_shards(self) -> int:
        return len(self._files)

    def records(self, shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
        tf = _import_tensorflow()
        for piece in files.pieces(self._files, shard, num_shards, by_line=False):
            try:
                for data in tf.data.TFRecordDataset(str(piece.file.path)).as_numpy_iterator():
                    features = tf.train.Example.FromString(data).features.feature
                    yield {name: _scalar(value) for name, value in features.items()}
            except tf.errors.DataLossError as e:
                raise UserError(f"{piece.file.path} is truncated or damaged: copy it again") from e

    def identity(self) -> str:
        return files.content_hash(self._files)


def _scalar(feature: Any) -> Any:
    values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
    return values[0] if len(values) == 1 else list(values)


def _plain(value: Any) -> Any:
    """Bytes become text and NumPy scalars Python's own."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _no_feature(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    mend = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
    return f"no feature {name!r}: {mend}"


def _no_split(where: Any, split: str, known: Sequence[str]) -> str:
    return f"{where} has no split {split!r}: choose one of {', '.join(known)}"


def _builder_by_name(name: str, data_dir: str | None) -> Any:
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        first = str(e).strip().splitlines()[0]
        raise UserError(f"TfdsSource.name {name!r}: {first}") from e
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}: run "
            f"`tfds build {name}`, or set TfdsSource.data_dir"
        )
    return builder


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as e:
        raise UserError(
            f"TfdsSource needs TensorFlow Datasets ({e}): pip install t5like[all]"
        ) from e
    return tensorflow_datasets


def _import_tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as e:
        raise UserError(f"TfdsSource needs TensorFlow ({e}): pip install t5like[all]") from e
    return tensorflow
