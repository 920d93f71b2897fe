"""Every objective through the real pipeline: packed or not, documents apart or not."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kernels.block_sparse_attention.flash import make_problem
from objectives.bart import Bart
from objectives.causal_lm import CausalLM
from objectives.codegen2 import CodeGen2
from objectives.distillation import Distillation
from objectives.electra import Electra
from objectives.ernie_gram import ErnieGram
from objectives.fim import FIM
from objectives.mixture import Mixture
from objectives.mlm import MaskedLM
from objectives.next_token import NextToken
from objectives.prefix_lm import PrefixLM
from objectives.prop import PROP
from objectives.span_corruption import SpanCorruption
from objectives.ul2 import UL2
from t5like.data.examples import Document
from t5like.data.pipeline import Component, Pipeline
from t5like.errors import UserError
from t5like.models.attention_layout import Layout
from t5like.models.visibility import self_mask

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


def pipeline_of(bound, corpus, *, pack, across):
    return Pipeline(
        [Component(name, corpus, *part) for name, part in bound.components().items()],
        vocabulary=bound.setting.vocabulary,
        architecture=bound.setting.architecture,
        length=bound.lengths.inputs,
        targets_length=bound.lengths.targets,
        batch_size=8,
        seed=0,
        pack=pack,
        attend_across_documents=across or not bound.keeps_documents_apart,
        shuffle=False,
    )


@pytest.mark.parametrize(("objective", "architecture"), CASES)
@pytest.mark.parametrize(("pack", "across"), [(False, True), (True, False)])
def test_batches(setting, objective, architecture, pack, across):
    corpus = MemoryCorpus()
    where = setting(architecture, 64, framed=architecture == "encoder")
    bound = objective.bind(dataclasses.replace(where, corpus=corpus))
    parts = bound.components()
    pipeline = pipeline_of(bound, corpus, pack=pack, across=across)
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


# --- who sees whom ---------------------------------------------------------------------------


class RisingCorpus(MemoryCorpus):
    """Its next 887 tokens are all different, so that a token says which one of a text it is."""

    def __init__(self):
        super().__init__()
        self.all = (3 + np.arange(self.num_tokens) % 887).astype(np.uint16)


def leaks(batch):
    """Slots whose answer, an ordinary token, stands as an input in a slot that they see."""
    tokens, answers = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
    asked = (batch["decoder_loss_weights"] > 0) & (answers >= 3) & (answers < 890)
    seen = np.asarray(self_mask(batch, "decoder").dense(*2 * tokens.shape[1:]))[:, 0]  # [B, L, L]
    shown = seen & (tokens[:, None, :] == answers[:, :, None])
    return int((shown.any(axis=2) & asked).sum()), int(asked.sum())


DECODERS = [one for one, stack in CASES if stack == "decoder" and isinstance(one, NextToken)]
DECODERS += [
    PrefixLM(sentinel=True),
    PrefixLM(loss_on_inputs=True, bidirectional_inputs=False),
    SpanCorruption(bidirectional_inputs=False),
]


@pytest.mark.parametrize("objective", DECODERS)
def test_no_slot_sees_its_answer(setting, objective):
    corpus = RisingCorpus()
    bound = objective.bind(setting("decoder", 64))
    for pack in (False, True):
        for across in (True, False):
            pipeline = pipeline_of(bound, corpus, pack=pack, across=across)
            for step in range(3):
                seen, asked = leaks(pipeline.batch(step))
                assert seen == 0 < asked


def test_a_prefix_that_is_predicted_and_sees_itself_sees_its_answers(setting):
    """As PrefixLM says; and so the search for leaks finds some where there are."""
    bound = PrefixLM(loss_on_inputs=True).bind(setting("decoder", 64))
    seen, asked = leaks(pipeline_of(bound, RisingCorpus(), pack=True, across=True).batch(0))
    assert asked / 4 < seen < asked


SEEN_AHEAD = [
    (CausalLM(), False),
    (CodeGen2(), False),
    (FIM(), False),
    (SpanCorruption(bidirectional_inputs=False), False),
    (PrefixLM(), True),
    (Distillation(student=SpanCorruption(), teacher_from="unread"), True),
    (MaskedLM(), True),
    (Mixture(objectives={"clm": CausalLM(), "prefix": PrefixLM()}), True),
]


@pytest.mark.parametrize(("objective", "sees_ahead"), SEEN_AHEAD)
def test_what_a_model_knows_of_a_mask_before_it_runs(setting, objective, sees_ahead):
    """A causal run's lists of blocks have the room of a triangle, and its halves are swapped."""
    bound = objective.bind(setting("decoder", 1024))
    pipeline = pipeline_of(bound, MemoryCorpus(), pack=True, across=False)
    batch = pipeline.batch(0)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == pipeline.spec()
    assert ("decoder_causal_attention" in batch) == sees_ahead
    found = {}

    def look(batch):
        mask = self_mask(batch, "decoder")
        problem = make_problem(mask, 1024, 1024, (128, 128), scale=1.0, soft_cap=None)
        found["room"] = problem.by_row.rows.shape[-1]
        found["swaps"] = layout.swaps_queries(mask, 1024, 1024)

    layout = Layout((), (), (), (), queries=("sequence",), keys=("sequence",))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("sequence",))):
        jax.eval_shape(look, batch)
    assert found == {"room": 64 if sees_ahead else 36, "swaps": not sees_ahead}


@pytest.mark.parametrize("architecture", ErnieGram.architectures)
@pytest.mark.parametrize("cut", ["window", "document"])
def test_a_query_has_the_segment_and_the_position_of_its_mask(setting, architecture, cut):
    corpus = MemoryCorpus()
    where = dataclasses.replace(setting(architecture, 64), corpus=corpus)
    bound = ErnieGram(cut=cut, bigrams=200, trigrams=50, min_count=1).bind(where)
    names = ("segment_ids", "positions", "isolated", "loss_weights", "input_tokens")
    for pack in (False, True):
        pipeline = pipeline_of(bound, corpus, pack=pack, across=False)
        for step in range(3):
            batch = pipeline.batch(step)
            ids, positions, isolated, weights, tokens = (
                batch[f"{architecture}_{name}"] for name in names
            )
            assert isolated.any()
            for row, query in np.argwhere(isolated):
                texts = (positions[row] == 0) & (isolated[row] == 0)
                mask = np.flatnonzero(texts[:query])[-1] + positions[row, query]
                assert mask < query and weights[row, mask] and not isolated[row, mask]
                assert tokens[row, mask] == bound.setting.vocabulary.mask_id
                assert ids[row, mask] == ids[row, query] > 0


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
