"""How a decoder's texts are read: as the objective, or the last phase, taught it."""

from __future__ import annotations

import numpy as np
import pytest

from objectives.base import Setting
from objectives.causal_lm import CausalLM
from objectives.mixture import Mixture
from objectives.mlm import MaskedLM
from objectives.phases import Phases
from objectives.span_corruption import SpanCorruption
from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.evaluation.model import TrainedModel
from t5like.models.config import ModelConfig

PHASES = [CausalLM(), MaskedLM()]


@pytest.mark.parametrize(
    ("objective", "in_place"),
    [
        (CausalLM(), False),
        (SpanCorruption(), False),
        (MaskedLM(), True),
        (Phases(phases=PHASES, until=[0.5]), True),
        (Phases(phases=PHASES[::-1], until=[0.5]), False),
        (Mixture(objectives={"clm": CausalLM(), "mlm": MaskedLM()}), True),
    ],
)
def test_a_decoder_reads_a_text_as_it_was_last_trained_to(objective, in_place):
    vocabulary = ByteVocabulary()
    bound = objective.bind(Setting("decoder", vocabulary, 32))
    config = ModelConfig(architecture="decoder", vocab_size=512)
    model = TrainedModel(config, None, vocabulary, bound, bound.reads_both_ways)
    rows = model.rows(["abc"], 8)
    text = vocabulary.encode("abc").tolist()
    seen = rows["decoder_input_tokens"][0]
    expected = [*text, vocabulary.eos_id] if in_place else [vocabulary.bos_id, *text]
    assert seen[:4].tolist() == expected
    both_ways = in_place or isinstance(objective, SpanCorruption)
    assert ("decoder_causal_attention" in rows) == both_ways
    assert not both_ways or np.all(rows["decoder_causal_attention"][0, :4] == 1)
