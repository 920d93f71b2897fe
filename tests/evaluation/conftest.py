"""Tiny models over bytes, with parameters drawn in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from t5like.data.examples import Seq2Seq
from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.evaluation.model import TrainedModel
from t5like.inference.infill_formats import Sentinels
from t5like.models.axes import parameter_shapes
from t5like.models.config import ModelConfig

VOCABULARY = ByteVocabulary(extra_ids=8)
TINY = ModelConfig(
    vocab_size=384,
    num_layers=1,
    d_model=16,
    d_ff=24,
    num_heads=2,
    head_dim=8,
    position="learned",
    max_length=96,
)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """An objective that continues and infills, as T5 does."""

    reads_in_place = sees_ahead = False

    def infilling(self):
        return Sentinels(VOCABULARY.sentinels, VOCABULARY.eos_id, bidirectional_inputs=False)

    def continuation(self, prefix, rest):
        targets = np.append(rest, VOCABULARY.eos_id).astype(np.int32)
        return Seq2Seq(prefix, targets, bidirectional_inputs=False)


@dataclasses.dataclass(frozen=True)
class Mute:
    """An objective that does neither, such as masked language modelling."""

    reads_in_place = sees_ahead = True

    def infilling(self):
        return None

    def continuation(self, prefix, rest):
        return None


def parameters_of(config: ModelConfig, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(0)

    def draw(path, shape):
        values = rng.normal(size=shape.shape) * scale / np.sqrt(shape.shape[-1])
        return (values + (path[-1].key == "scale")).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


@pytest.fixture(scope="session")
def trained():
    """(architecture, speaks=True, both_ways=False) -> a tiny model."""

    def make(architecture: str, speaks: bool = True, both_ways: bool = False) -> TrainedModel:
        config = dataclasses.replace(TINY, architecture=architecture)
        objective = Speaker() if speaks else Mute()
        return TrainedModel(config, parameters_of(config), VOCABULARY, objective, both_ways)

    return make
