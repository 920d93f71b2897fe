"""A model is asked to fill blanks just as it was trained to: prompts and answers are examples."""

from __future__ import annotations

import numpy as np
import pytest

from objectives.causal_lm import CausalLM
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from objectives.ul2 import UL2
from t5like.data.rng import generator

EOS = 1


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize(
    "objective",
    [SpanCorruption(bidirectional_inputs=False), UL2(), UL2(denoisers=[("X", 8, 0.5)], rates=None)],
)
def test_sentinels(setting, record, objective, architecture):
    bound = objective.bind(setting(architecture, 64))
    part, _ = next(iter(bound.components().values()))
    form = part.infilling()
    example = part.corrupt(record(50), generator(3, "x"))
    marks = np.isin(example.inputs, form.sentinels).nonzero()[0]
    modes = len(form.mode_ids)
    assert len(marks) >= 2 and modes == isinstance(objective, UL2)
    pieces = np.split(example.inputs[modes:-1], marks - modes)
    parts = [pieces[0], *(piece[1:] for piece in pieces[1:])]
    spans, well_formed = form.parse(example.targets, len(marks))
    assert well_formed and all(len(span) for span in spans)
    assert form.prompt(parts).tolist() == example.inputs.tolist()
    assert form.answer(spans).tolist() == example.targets.tolist()
    assert form.bidirectional_inputs == example.bidirectional_inputs
    assert form.stop_id == EOS


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize(
    "objective", [SpanCorruption(), SpanCorruption(random_roll=True), UL2(), UL2(random_roll=False)]
)
def test_as_many_blanks_can_be_asked_for_as_were_taught(setting, record, objective, architecture):
    bound = objective.bind(setting(architecture, 128))
    form = bound.infilling()
    taught = 0
    for part, _ in bound.components().values():
        if isinstance(objective, UL2) and part.denoiser.mode != "R":
            continue
        raw = part.unit.raw_length
        for seed in range(30):
            example = part.corrupt(record(raw, seed), generator(seed, "x"))
            taught = max(taught, np.isin(example.targets, setting().vocabulary.sentinels).sum())
    assert form.most_blanks == taught < 20
    np.testing.assert_array_equal(form.marks, setting().vocabulary.sentinels[:taught])


def test_objectives_without_spans_teach_no_infilling(setting):
    only_s = UL2(denoisers=[("S", None, 0.25)], rates=None)
    for objective in (CausalLM(), PrefixLM(), only_s):
        assert objective.bind(setting("decoder", 64)).infilling() is None
