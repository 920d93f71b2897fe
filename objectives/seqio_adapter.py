"""Any objective as the last preprocessor of a seqio Task.

    seqio.Task(
        "my_task",
        source=...,
        preprocessors=[seqio.preprocessors.tokenize, objective_preprocessor(SpanCorruption())],
        output_features={"inputs": ..., "targets": ...},
    )

No `append_eos` after it: the objective puts EOS where it belongs. seqio and TensorFlow are
imported when the task is read, not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from objectives.base import Objective, Setting
from t5like.data.examples import Aligned, Document, Example, Record, Unit
from t5like.data.rng import generator
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class _SeqioVocabulary:
    """What objectives ask of a vocabulary, answered by a seqio vocabulary."""

    wrapped: Any

    @property
    def size(self) -> int:
        return self.wrapped.vocab_size

    @property
    def eos_id(self) -> int | None:
        return self.wrapped.eos_id

    @property
    def pad_id(self) -> int:
        return self.wrapped.pad_id

    @property
    def bos_id(self) -> int:
        return self.wrapped.pad_id

    @property
    def sentinels(self) -> np.ndarray:
        return np.arange(self.size - 1, self.size - 1 - self.wrapped.extra_ids, -1, np.int32)

    @property
    def mask_id(self) -> int | None:
        return int(self.sentinels[0]) if len(self.sentinels) else None

    def named_id(self, *names: str) -> int | None:
        return None

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.wrapped.encode(text), np.int32)

    def word_starts(self) -> np.ndarray:
        """bool [size], by SentencePiece's mark of a space."""
        tokenizer = getattr(self.wrapped, "tokenizer", None)
        if tokenizer is None:
            raise UserError(f"{type(self.wrapped).__name__} does not say where words start")
        starts = np.ones(self.size, bool)
        pieces = map(tokenizer.id_to_piece, range(tokenizer.get_piece_size()))
        starts[: tokenizer.get_piece_size()] = [piece[:1] == "\u2581" for piece in pieces]
        return starts


def objective_preprocessor(
    objective: Objective,
    *,
    architecture: str | None = None,
    feature: str = "targets",
    seed: int = 0,
) -> Callable[..., Any]:
    """A seqio preprocessor that turns documents of tokens into an objective's examples.

    Windows run over documents in the dataset's order, and example i is corrupted with a generator
    of (seed, i), so the same dataset gives the same examples. Put it after any caching.

    Args:
      objective: unbound; it is bound to the vocabulary of `feature` and to sequence_length (of
        "inputs", and of "targets" for an encoder-decoder).
      architecture: what the examples are for; None: the first that the objective trains.
      feature: the feature with a document's tokens, without EOS.
      seed: of all draws.

    Returns:
      preprocessor(dataset, sequence_length, output_features) -> dataset of "targets", of "inputs"
      if output_features has them, and for masked language modelling of "loss_weights". Raises
      what `objective.bind` raises.
    """
    architecture = architecture or objective.architectures[0]

    def preprocess(
        dataset: Any, sequence_length: Mapping[str, int], output_features: Mapping[str, Any]
    ) -> Any:
        both = architecture == "encoder_decoder"
        row = "inputs" if both or "inputs" in sequence_length else "targets"
        setting = Setting(
            architecture=architecture,
            vocabulary=_SeqioVocabulary(output_features[feature].vocabulary),
            length=sequence_length[row],
            targets_length=sequence_length.get("targets") if both else None,
        )
        parts = list(objective.bind(setting).components().values())
        if len(parts) > 1:
            raise UserError(
                f"{type(objective).__name__} draws each example from {len(parts)} parts, whose "
                "records differ: make a seqio Task of each, and a Mixture of them"
            )
        bound, _ = parts[0]
        with_inputs = "inputs" in output_features
        return _corrupt(_records(dataset, feature, bound.unit), bound, with_inputs, seed)

    return preprocess


def _records(dataset: Any, feature: str, unit: Unit) -> Any:
    """Documents of tokens -> {"tokens", "documents", "left"}, int32 [R] each, cut as `unit` says.

    `left` counts the tokens that follow in the document.
    """
    import tensorflow as tf

    separator = None if isinstance(unit, Document) else unit.separator

    def fields(index, example):
        tokens = tf.cast(example[feature], tf.int32)
        if separator is not None:
            tokens = tf.concat([tokens, [separator]], 0)
        size = tf.size(tokens)
        documents = tf.fill([size], tf.cast(index, tf.int32))
        return {"tokens": tokens, "documents": documents, "left": tf.range(size)[::-1]}

    documents = dataset.enumerate().map(fields).filter(lambda x: tf.size(x["tokens"]) > 0)
    if isinstance(unit, Document):
        return documents.flat_map(
            lambda x: tf.data.Dataset.from_tensors(x).rebatch(unit.max_raw_length)
        )
    return documents.rebatch(unit.raw_length)


def _corrupt(records: Any, objective: Objective, with_inputs: bool, seed: int) -> Any:
    import tensorflow as tf

    def corrupt(index, tokens, documents, left):
        numbers = np.unique(documents, return_inverse=True)[1].astype(np.int32)
        record = Record(tokens, numbers, ends_document=bool(left[-1] == 0))
        return _features(objective.corrupt(record, generator(seed, "seqio", int(index))))

    def in_graph(index, record):
        arguments = [index, record["tokens"], record["documents"], record["left"]]
        types = [tf.int32, tf.int32, tf.float32]
        inputs, targets, weights = tf.numpy_function(corrupt, arguments, types, stateful=False)
        features = {"targets": targets, "loss_weights": weights}
        if with_inputs:
            features["inputs"] = inputs
        if "encoder" not in objective.architectures:  # every target counts
            del features["loss_weights"]
        return {name: tf.ensure_shape(x, [None]) for name, x in features.items()}

    return records.enumerate().map(in_graph, num_parallel_calls=tf.data.AUTOTUNE)


def _features(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, targets, loss weights) of an example."""
    if isinstance(example, Aligned):
        return example.tokens, example.targets, example.weights
    return example.inputs, example.targets, np.ones(len(example.targets), np.float32)
