"""Every objective through the real pipeline: packed or not, documents apart or not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from objectives.bart import Bart
from objectives.causal_lm import CausalLM
from objectives.codegen2 import CodeGen2
from objectives.distillation import Distillation
from objectives.electra import Electra
from objectives.ernie_gram import ErnieGram
from objectives.fim import FIM
from objectives.mlm import MaskedLM
from objectives.prefix_lm import PrefixLM
from objectives.prop import PROP
from objectives.span_corruption import SpanCorruption
from objectives.ul2 import UL2
from t5like.data.examples import Document
from t5like.data.pipeline import Component, Pipeline
from t5like.errors import UserError

CASES = [
    (CausalLM(), "decoder"),
    (CausalLM(cut="document"), "decoder"),
    (CodeGen2(), "decoder"),
    (CodeGen2(cut="document"), "decoder"),
    (FIM(), "decoder"),
    (FIM(cut="window", end_every_middle=False), "decoder"),
    (PrefixLM(), "decoder"),
    (PrefixLM(), "encoder_decoder"),
    (PrefixLM(cut="document"), "decoder"),
    (PrefixLM(cut="document", noise_density=0.25), "encoder_decoder"),
    (SpanCorruption(), "encoder_decoder"),
    (SpanCorruption(random_roll=True), "encoder_decoder"),
    (SpanCorruption(cut="document"), "encoder_decoder"),
    (SpanCorruption(cut="document", random_roll=True), "decoder"),
    (UL2(), "encoder_decoder"),
    (UL2(cut="document", s_sentinel=True), "decoder"),
    (MaskedLM(), "encoder"),
    (MaskedLM(whole_word=True, cut="document"), "encoder"),
    (MaskedLM(selection="iid"), "decoder"),
    (ErnieGram(bigrams=200, trigrams=50, min_count=1), "encoder"),
    (ErnieGram(cut="document", bigrams=200, trigrams=50, min_count=1), "decoder"),
    (ErnieGram(masking="contiguous", comprehensive=False, relation=False), "encoder"),
    (Bart(), "encoder_decoder"),
    (Bart(cut="window"), "encoder_decoder"),
    (Distillation(student=UL2(), teacher_from="unread"), "decoder"),
    (Electra(), "encoder"),
    (Electra(cut="document"), "decoder"),
    (PROP(), "encoder"),
]


class MemoryCorpus:
    """Documents of 1 to 150 tokens; no token is special in the toy vocabulary."""

    def __init__(self):
        rng = np.random.default_rng(0)
        lengths = np.concatenate([[1, 1, 2], rng.integers(1, 150, 40), [1]])
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_documents, self.num_tokens = len(lengths), int(self.offsets[-1])
        self.metadata, self.fingerprint = {}, "memory"
        self.all = rng.integers(3, 890, self.num_tokens).astype(np.uint16)

    def tokens(self, start, stop):
        return self.all[start:stop]


@pytest.mark.parametrize(("objective", "architecture"), CASES)
@pytest.mark.parametrize(("pack", "across"), [(False, True), (True, False)])
def test_batches(setting, objective, architecture, pack, across):
    corpus = MemoryCorpus()
    where = setting(architecture, 64, framed=architecture == "encoder")
    bound = objective.bind(dataclasses.replace(where, corpus=corpus))
    across = across or not bound.keeps_documents_apart
    parts = bound.components()
    pipeline = Pipeline(
        [Component(name, corpus, *part) for name, part in parts.items()],
        vocabulary=bound.setting.vocabulary,
        architecture=architecture,
        length=bound.lengths.inputs,
        targets_length=bound.lengths.targets,
        batch_size=8,
        seed=0,
        pack=pack,
        attend_across_documents=across,
        shuffle=False,
    )
    drawn = []
    for one in pipeline.examples():
        drawn.append(one)
        if sum(len(d.record.tokens) for d in drawn) >= corpus.num_tokens + 300:
            break
    raw = np.concatenate([d.record.tokens for d in drawn])
    unit = next(iter(parts.values()))[0].unit
    if len(parts) == 1 and (isinstance(unit, Document) or unit.separator is None):
        assert raw[: corpus.num_tokens].tolist() == corpus.all.tolist()

    for step in range(6):
        batch = pipeline.batch(step)
        side = "decoder" if "decoder" in architecture else "encoder"
        weights = batch[f"{side}_loss_weights"]
        assert (weights[batch[f"{side}_segment_ids"] == 0] == 0).all()
        assert weights.sum() > 0
        for name, array in batch.items():
            assert array.min() >= 0 and (not name.endswith("tokens") or array.max() < 1000)


@pytest.mark.parametrize("architecture", SpanCorruption.architectures)
def test_spans_of_a_window_cannot_be_kept_to_their_documents(setting, architecture):
    bound = SpanCorruption().bind(setting(architecture, 64))
    with pytest.raises(UserError, match="attend_across_documents=False.*'document'"):
        Pipeline(
            [Component("all", MemoryCorpus(), bound)],
            vocabulary=bound.setting.vocabulary,
            architecture=architecture,
            length=bound.lengths.inputs,
            targets_length=bound.lengths.targets,
            batch_size=8,
            seed=0,
            attend_across_documents=False,
        )


def test_equal_seeds_give_equal_batches_and_other_seeds_do_not(setting):
    bound = MaskedLM().bind(setting("encoder", 64))
    corpus = MemoryCorpus()
    batches = [
        Pipeline(
            [Component("all", corpus, bound)],
            vocabulary=bound.setting.vocabulary,
            architecture="encoder",
            length=64,
            batch_size=4,
            seed=seed,
        ).batch(3)
        for seed in (0, 0, 1)
    ]
    first, again, other = map(Pipeline.hash, batches)
    assert first == again != other
