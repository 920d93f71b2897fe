"""PROP: pairs as examples and in batches, and the ranking loss's known values."""

from __future__ import annotations

import dataclasses
import math
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import pair_ranking
from objectives.prop import PROP
from t5like.data.examples import Document, Record
from t5like.data.layout import lay_out
from t5like.data.pipeline import Component, Pipeline
from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.flops import train_flops as backbone_flops
from tests.objectives.toy_corpus import VOCABULARY, bind, toy_corpus

MASK, SUMMARY, SEPARATOR = 2, 990, 991
L = 64


@pytest.fixture(scope="module")
def corpus():
    return toy_corpus()


@pytest.fixture(scope="module")
def bound():
    return bind()


# --- examples --------------------------------------------------------------------------------


def parts(member):
    """(set, document) tokens of a member, its frame checked."""
    types, text = member.features["token_types"], member.targets
    start = int(types.argmax())
    assert types.tolist() == [0] * start + [1] * (len(text) - start)
    assert text[0] == SUMMARY and text[start - 1] == text[-1] == SEPARATOR
    return text[1 : start - 1], text[start:-1]


def words_of(bound, tokens):
    return bound._sampler.find(VOCABULARY.decode(tokens))


@pytest.mark.parametrize("fields", [{}, {"mean_set_words": 9.0}, {"selection": "iid"}])
def test_pairs(corpus, fields):
    if "selection" in fields:
        fields = fields | {"max_predictions": None}
    bound = bind(**fields)
    lengths, differs = [], False
    for i in range(400):
        record = corpus.record(i % 200)
        tokens = record.tokens[: bound.unit.max_raw_length]
        before = tokens.copy()
        record = Record(tokens, record.documents[: len(tokens)])
        example = bound.corrupt(record, generator(0, "x", i))
        assert record.tokens.tolist() == before.tolist()
        better, worse = (words_of(bound, parts(m)[0]) for m in example.members)
        assert len(better) == len(worse) >= 1
        document = bound._sampler.count(VOCABULARY.decode(tokens))
        scores = [bound._sampler.score(document, w) for w in (better, worse)]
        assert scores[0] >= scores[1]
        bound_length = bound.bounds(len(tokens), generator(0, "x", i)).inputs
        for member in example.members:
            drawn, shown = parts(member)
            assert shown.tolist() == tokens.tolist() and len(drawn) <= 16
            start = len(drawn) + 2
            assert not member.weights[:start].any() and not member.weights[-1]
            asked = member.weights > 0
            assert np.where(asked, member.targets, member.tokens).tolist() == (
                member.targets.tolist()
            )
            assert len(member.tokens) <= bound_length <= L
        first, second = (m.weights[-len(tokens) - 1 :] for m in example.members)
        differs |= not np.array_equal(first, second)
        lengths.append(len(better))
    assert differs and len(set(lengths)) > 3
    if not fields:
        assert abs(np.mean(lengths) - 3.157) < 0.4
        assert abs(np.mean(np.array(lengths) == 1) - 0.157) < 0.075


def test_a_document_that_is_too_long_loses_its_end(corpus, bound):
    tokens = np.tile(corpus.record(5).tokens, 10)[:200]
    example = bound.corrupt(Record(tokens, np.zeros(200, np.int32)), generator(0, "x"))
    for member in example.members:
        assert parts(member)[1].tolist() == tokens[: L - 19].tolist()
    assert len(tokens) == 200


@pytest.mark.parametrize("fields", [{}, {"whole_word": False}])
def test_a_document_of_no_tokens_is_ranked_and_hides_nothing(fields):
    record = Record(np.empty(0, np.int32), np.empty(0, np.int32))
    for member in bind(**fields).corrupt(record, generator(0, "x")).members:
        drawn, shown = parts(member)
        assert len(drawn) and not len(shown) and not member.weights.any()


def test_the_more_likely_set_is_first_and_the_second_wins_ties(corpus):
    bound = bind(min_frequency=1)
    record, sampler = corpus.record(5), bound._sampler
    document = sampler.count(VOCABULARY.decode(record.tokens))
    a, b = document.words[:2]
    absent = np.setdiff1d(np.arange(len(sampler.words)), document.words)[0]
    for sets, winner in [([[a], [absent]], 0), ([[absent], [a]], 1), ([[a, b], [b, a]], 1)]:
        sampler.draw = lambda *_, sets=sets: np.array(sets)
        better, worse = bound.corrupt(record, generator(0, "x")).members
        assert words_of(bound, parts(better)[0]).tolist() == sets[winner]
        assert words_of(bound, parts(worse)[0]).tolist() == sets[1 - winner]


@pytest.mark.parametrize(("count", "limit", "budget"), [(20, 60, 3), (300, 60, 45), (300, 9, 9)])
def test_the_budget_counts_words(count, limit, budget):
    """Words of two tokens: 15% of the words, in tokens, and no word in part."""
    bound = bind(length=700, max_predictions=limit)
    tokens = np.tile(np.array([30, 31], np.int32), count)
    record = Record(tokens, np.zeros(len(tokens), np.int32))
    for i in range(20):
        for member in bound.corrupt(record, generator(0, "x", i)).members:
            asked = member.weights[member.features["token_types"] == 1][:-1].reshape(-1, 2)
            assert (asked[:, 0] == asked[:, 1]).all()
            assert budget - 1 <= asked.sum() <= budget


def test_each_hidden_token_shows_the_mask_or_a_random_one_or_itself():
    bound = bind(length=700)
    tokens = np.tile(np.array([30, 31], np.int32), 300)
    record = Record(tokens, np.zeros(len(tokens), np.int32))
    members = [m for i in range(60) for m in bound.corrupt(record, generator(0, "x", i)).members]
    seen, wanted = (
        np.concatenate([x[m.weights > 0] for x, m in zip(values, members, strict=True)])
        for values in ([m.tokens for m in members], [m.targets for m in members])
    )
    tolerance = 4 * 0.5 / math.sqrt(len(seen))
    assert abs((seen == MASK).mean() - 0.8) < tolerance
    assert abs((seen == wanted).mean() - 0.1) < tolerance


def test_punctuation_begins_a_word_to_hide(setting):
    class Vocabulary(type(setting("encoder").vocabulary)):
        def piece(self, i):
            return {4: "(", 5: "_x", 7: "##ing", 8: "<0x0A>"}.get(i, super().piece(i))

    bound = PROP().bind(dataclasses.replace(setting("encoder"), vocabulary=Vocabulary()))
    assert bound._word_starts[:11].tolist() == [i in (0, 3, 4, 5, 6, 9) for i in range(11)]


def test_batches_keep_pairs_together(corpus, bound):
    for pack in (False, True):
        pipeline = Pipeline(
            [Component("all", corpus, bound)],
            vocabulary=bound.setting.vocabulary,
            architecture="encoder",
            length=L,
            batch_size=8,
            seed=0,
            pack=pack,
        )
        batch = pipeline.batch(1)
        assert {array.shape for array in batch.values()} == {(8, 2, L)}
        starts = (batch["encoder_positions"] == 0) & (batch["encoder_segment_ids"] > 0)
        np.testing.assert_array_equal(starts[:, 0], starts[:, 1])
        assert starts[:, 0].sum(axis=1).max() == (2 if pack else 1)
        assert (batch["encoder_input_tokens"][starts] == SUMMARY).all()
        halves = [pipeline.batch(1, (range(4 * half, 4 * half + 4),)) for half in (0, 1)]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_lengths_are_known_without_a_corpus(setting):
    bound = PROP().bind(setting("encoder", 512, framed=True))
    assert bound.unit == Document(512 - 3 - 32) and bound.lengths.inputs == 512
    assert bound.bounds(100, generator(0, "x")).inputs == 135
    with pytest.raises(UserError, match=r"Setting.corpus"):
        bound.corrupt(Record(np.array([30, 31]), np.zeros(2)), generator(0, "x"))


def test_a_vocabulary_without_frame_uses_bos_and_eos(setting, corpus):
    bound = PROP().bind(dataclasses.replace(setting("encoder", L), corpus=corpus))
    for member in bound.corrupt(corpus.record(3), generator(0, "x")).members:
        assert member.targets[0] == 0 and member.targets[-1] == 1
        assert (member.targets == 1).sum() == 2


def test_workers_draw_the_same(corpus, bound):
    there = pickle.loads(pickle.dumps(bound))
    for here, other in zip(
        bound.corrupt(corpus.record(3), generator(0, "x")).members,
        there.corrupt(corpus.record(3), generator(0, "x")).members,
        strict=True,
    ):
        np.testing.assert_array_equal(here.tokens, other.tokens)


def test_held_out_data_is_drawn_by_the_training_corpuss_statistics():
    bound = bind()
    assert bound.evaluation() is bound
    other = bind(rate=0.4).evaluation()
    assert other.rate == 0.15 and other.setting.corpus is bound.setting.corpus


def test_readable(corpus, bound):
    class Reader:
        vocabulary = bound.setting.vocabulary
        text = vocabulary.decode

        def runs(self, ids, style):
            return [(self.vocabulary.decode(ids), style if isinstance(style, str) else "given")]

    example = bound.corrupt(corpus.record(5), generator(0, "x"))
    batch = lay_out(
        [[example]], architecture="encoder", length=L, bos_id=0, pad_id=0,
        features=bound.features, members=2,
    )  # fmt: skip
    row = {name: array[0] for name, array in batch.items()}
    lines = dict(bound.readable(row, Reader()))
    assert len(lines) == 6
    document = bound._sampler.count(Reader.text(corpus.record(5).tokens))
    for m, member in enumerate(example.members, 1):
        (drawn, _), (score, _) = lines[f"{m}. word set"]
        assert drawn == Reader.text(parts(member)[0])
        value = bound._sampler.score(document, words_of(bound, parts(member)[0]))
        assert score.endswith(f"{value:.2f}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: PROP(cut="window"), "PROP.cut is 'window'"),
        (lambda make: PROP(word_pattern="["), "PROP.word_pattern is '\\['"),
        (lambda make: PROP(mean_set_words=0.0), "PROP.mean_set_words is 0.0"),
        (lambda make: PROP(max_set_tokens=0), "PROP.max_set_tokens is 0"),
        (lambda make: PROP(sampled_words=0), "PROP.sampled_words is 0"),
        (lambda make: PROP().bind(make("decoder")), "it trains encoder"),
        (lambda make: PROP().bind(make("encoder", mask=False)), "has no mask token"),
        (lambda make: PROP().bind(make("encoder", eos_id=None)), "end-of-sequence"),
        (lambda make: PROP().bind(make("encoder", 4)), "train.length is 4; PROP needs 5"),
    ],
)
def test_errors(setting, make, message):
    with pytest.raises(UserError, match=message):
        make(setting)


# --- loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("difference", "loss"), [(0, 1.0), (2, 0.2384), (-2, 1.7616), (4, 0.0360)])
def test_known_losses(difference, loss):
    assert pair_ranking.pair_loss(0.5 + difference, 0.5) == pytest.approx(loss, abs=5e-5)
    p = np.exp([difference, 0]) / np.exp([difference, 0]).sum()  # the released code's form
    assert max(0.0, 1 - (p[0] - p[1])) == pytest.approx(loss, abs=5e-5)


def test_a_swapped_pair_loses_two_minus_the_loss_and_gradients_are_opposite():
    first, second = jnp.array([0.3, -4.0, 9.0]), jnp.array([1.1, 2.0, -3.0])
    loss = pair_ranking.pair_loss
    np.testing.assert_allclose(loss(second, first), 2 - loss(first, second), rtol=1e-6)
    better, worse = jax.grad(lambda *s: loss(*s).sum(), (0, 1))(first, second)
    np.testing.assert_array_equal(better, -worse)
    assert (better < 0).all()


@pytest.fixture(scope="module")
def network(bound):
    """(compiled batch, params -> terms and gradients, parameters)."""
    config = ModelConfig(
        architecture="encoder", vocab_size=1000, num_layers=1, d_model=16, d_ff=32, num_heads=2,
        head_dim=8, token_types=2, position="learned",
    )  # fmt: skip
    module = bound.network(config)
    one = {name: np.zeros((1, 2, L), np.int32) for name in pair_batch(bound, [])}
    shapes = nn.unbox(jax.eval_shape(module.init, {"params": jax.random.key(0)}, one))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)

    @jax.jit
    def compute(params, batch):
        return bound.losses(module.apply, params, None, batch, jax.random.key(0), False)

    return compute, params


def pair_batch(bound, rows):
    return lay_out(
        rows, architecture="encoder", length=L, bos_id=0, pad_id=0, features=bound.features,
        members=2,
    )  # fmt: skip


def short_pairs(corpus, bound, count):
    short = [d for d in range(200) if np.diff(corpus.offsets)[d] <= 10]
    return [bound.corrupt(corpus.record(short[i]), generator(0, "x", i)) for i in range(count)]


def test_packed_rows_have_the_loss_of_rows_of_their_own(corpus, bound, network):
    compute, params = network
    assert set(params) == {"model", "prop_head"}
    pairs = short_pairs(corpus, bound, 4)
    alone = compute(params, pair_batch(bound, [[pair] for pair in pairs]))
    packed = compute(params, pair_batch(bound, [pairs[:2], pairs[2:3], pairs[3:], []]))
    assert set(alone) == {"ranking", "cross_entropy", "ranking_accuracy", "accuracy"}
    assert alone["ranking"].weight == 4 and alone["cross_entropy"].weight > 0
    for name, term in alone.items():
        assert term.weight == packed[name].weight
        np.testing.assert_allclose(term.sum, packed[name].sum, rtol=1e-5)


def test_swapped_members_and_uniform_scores(corpus, bound, network):
    compute, params = network
    batch = pair_batch(bound, [[pair] for pair in short_pairs(corpus, bound, 4)])
    terms = compute(params, batch)
    swapped = compute(params, {name: array[:, ::-1] for name, array in batch.items()})
    mean = terms["ranking"].sum / terms["ranking"].weight
    assert abs(mean - 1) > 1e-3
    np.testing.assert_allclose(swapped["ranking"].sum / 4, 2 - mean, rtol=1e-5)
    np.testing.assert_allclose(swapped["ranking_accuracy"].sum, 4 - terms["ranking_accuracy"].sum)
    np.testing.assert_allclose(swapped["cross_entropy"].sum, terms["cross_entropy"].sum, rtol=1e-5)
    uniform = compute(jax.tree.map(np.zeros_like, params), batch)
    assert uniform["ranking"].sum / 4 == 1.0
    tokens = uniform["cross_entropy"]
    np.testing.assert_allclose(tokens.sum / tokens.weight, math.log(1000), rtol=1e-6)
    assert (terms["ranking"].coefficient, terms["accuracy"].coefficient) == (1.0, 0.0)


def test_flops_count_both_members_and_the_head(bound):
    config = ModelConfig(architecture="encoder", vocab_size=1000, d_model=16)
    spec = {"encoder_input_tokens": ((8, 2, L), np.int32)}
    rows = {"encoder_input_tokens": ((16, L), np.int32)}
    head = 3 * 2 * 16 * 13 * (16 * 16 + 16)
    whole = backbone_flops(config, rows, bound.usual_predictions) + head
    assert bound.train_flops(config, spec) == whole
