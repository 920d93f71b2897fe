"""Masked language modelling: BERT's counts and proportions, and the gathered loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from objectives.mlm import MaskedLM
from t5like.data.examples import Document, Window
from t5like.data.rng import generator
from t5like.errors import UserError

CLS, SEP, MASK, EOS = 990, 991, 2, 1


def draws(objective, record, count, seed=0):
    return [objective.corrupt(record, generator(seed, "x", i)) for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 62),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["budget", "iid"]),
    st.sampled_from([0.15, 0.3, 0.5]),
    st.integers(0, 10**6),
)
def test_seen_and_asked_rebuild_the_text(
    setting, record, raw, framed, whole_word, selection, rate, seed
):
    objective = MaskedLM(selection=selection, rate=rate, whole_word=whole_word).bind(
        setting("encoder", 64, framed=framed)
    )
    drawn = record(raw, seed)
    example = objective.corrupt(drawn, generator(seed, "x"))
    text = [CLS, *drawn.tokens.tolist(), SEP] if framed else drawn.tokens.tolist()
    assert example.targets.tolist() == text
    assert np.where(example.weights > 0, example.targets, example.tokens).tolist() == text
    assert len(example.tokens) == len(example.weights) == len(text)
    assert example.weights.dtype == np.float32 and set(example.weights.tolist()) <= {0.0, 1.0}
    assert objective.bounds(raw, generator(seed, "x")).inputs == len(text) <= 64
    if framed:
        assert example.weights[0] == example.weights[-1] == 0
    if selection == "budget":
        budget = min(raw, max(1, round(len(text) * rate)))
        asked = int(example.weights.sum())
        assert asked <= budget if whole_word else asked == budget


@pytest.mark.parametrize(
    ("length", "limit", "count"), [(128, 20, 19), (512, None, 77), (512, 20, 20)]
)
def test_numbers_of_predictions_of_bert(setting, record, length, limit, count):
    objective = MaskedLM(max_predictions=limit).bind(setting("encoder", length, framed=True))
    example = objective.corrupt(record(length - 2), generator(0, "x"))
    assert example.weights.sum() == count


def test_proportions_of_bert(setting, record):
    objective = MaskedLM().bind(setting("encoder", 512))
    drawn = record(512)
    asked = np.concatenate(
        [np.stack([e.tokens, e.targets])[:, e.weights > 0] for e in draws(objective, drawn, 300)],
        axis=1,
    )
    n = asked.shape[1]
    tolerance = 4 * 0.5 / np.sqrt(n)
    assert abs((asked[0] == MASK).mean() - (0.8 + 0.1 / 1000)) < tolerance
    assert abs((asked[0] == asked[1]).mean() - (0.1 + 0.1 / 1000)) < tolerance
    random = asked[0][(asked[0] != MASK) & (asked[0] != asked[1])]
    assert random.min() < 20 and random.max() > 980 and abs(random.mean() - 500) < 30


def test_every_position_is_asked_alike(setting, record):
    objective = MaskedLM().bind(setting("encoder", 40))
    weights = np.mean([e.weights for e in draws(objective, record(40), 4000)], axis=0)
    assert np.abs(weights - 6 / 40).max() < 5 * np.sqrt(0.15 * 0.85 / 4000)


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3, 0.5])
def test_iid_rate(setting, record, rate):
    objective = MaskedLM(
        selection="iid", rate=rate, mask_probability=1.0, random_probability=0.0
    ).bind(setting("encoder", 512))
    examples = draws(objective, record(512), 200)
    assert abs(np.mean([e.weights for e in examples]) - rate) < 0.01
    assert len({e.weights.sum() for e in examples}) > 1
    assert all((e.tokens[e.weights > 0] == MASK).all() for e in examples)


def test_whole_words_are_asked_whole(setting, record):
    objective = MaskedLM(whole_word=True).bind(setting("encoder", 64))
    drawn = record(64)
    words = np.cumsum(drawn.tokens % 3 == 0)
    sizes = np.bincount(words)
    replaced_apart = False
    for example in draws(objective, drawn, 200):
        asked = np.bincount(words, example.weights)
        assert set(asked[asked > 0]) <= set(sizes) and (asked[asked > 0] == sizes[asked > 0]).all()
        assert example.weights.sum() <= 10
        for word in np.flatnonzero(asked > 1):
            masked = example.tokens[words == word] == MASK
            replaced_apart |= masked.any() and not masked.all()
    assert replaced_apart  # each piece has its own 80/10/10 draw


def test_words_that_exceed_the_budget_are_passed_over(setting, record):
    drawn = record(20)
    # Words of 5, 1, 5, 1, ... pieces and a budget of 3: only the short ones fit.
    drawn.tokens[:] = 4
    drawn.tokens[[0, 5, 6, 11, 12, 17]] = 3
    objective = MaskedLM(whole_word=True).bind(setting("encoder", 20))
    for example in draws(objective, drawn, 50):
        assert set(np.flatnonzero(example.weights)) <= {5, 11, 17, 18, 19}
        assert example.weights.sum() in (2, 3)


def test_a_word_ends_with_its_document(setting, record):
    drawn = record(20, documents=[10, 10])
    drawn.tokens[:] = 4
    objective = MaskedLM(whole_word=True, rate=0.5).bind(setting("encoder", 20))
    for example in draws(objective, drawn, 20):
        assert sorted(example.weights.reshape(2, 10).sum(axis=1).tolist()) == [0, 10]


def test_separators_are_never_asked(setting, record):
    drawn = record(64, documents=[20, 44])
    drawn.tokens[[19, 63]] = EOS
    objective = MaskedLM(rate=1.0).bind(setting("encoder", 64))
    example = objective.corrupt(drawn, generator(0, "x"))
    assert np.flatnonzero(example.weights == 0).tolist() == [19, 63]
    assert example.documents.tolist() == drawn.documents.tolist()


def test_units(setting):
    assert MaskedLM().bind(setting("encoder", 64)).unit == Window(64, separator=EOS)
    assert MaskedLM().bind(setting("decoder", 64, framed=True)).unit == Window(62, separator=SEP)
    assert MaskedLM(cut="document").bind(setting("encoder", 64)).unit == Document(64)


def test_held_out_data_is_masked_at_its_own_rate(setting):
    objective = MaskedLM(rate=0.4).bind(setting("encoder", 64))
    assert objective.evaluation().rate == 0.15
    assert objective.evaluation().setting is objective.setting
    assert MaskedLM(rate=0.4, eval_rate=None).evaluation().rate == 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: MaskedLM(rate=1.5), "MaskedLM.rate is 1.5"),
        (lambda make: MaskedLM(random_probability=0.3), "MaskedLM.random_probability is 0.3"),
        (lambda make: MaskedLM(selection="all"), "MaskedLM.selection is 'all'"),
        (lambda make: MaskedLM().bind(make("encoder", mask=False)), "has no mask token"),
        (lambda make: MaskedLM().bind(make("encoder_decoder")), "encoder or decoder"),
        (lambda make: MaskedLM().bind(make("encoder", 2, framed=True)), "train.length is 2"),
    ],
)
def test_errors(setting, make, message):
    with pytest.raises(UserError, match=message):
        make(setting)


def test_what_is_shown_depends_on_the_chosen_set_not_on_a_processors_order(setting, record):
    objective = MaskedLM(rate=0.5).bind(setting("encoder", 64))
    before = objective.corrupt(record(60, 0), generator(0, "x"))

    class Reversed(np.ndarray):
        def argpartition(self, count):
            return np.argsort(np.asarray(self))[:count][::-1]

    class Draws:
        def __init__(self, rng):
            self._rng = rng

        def random(self, size):
            return self._rng.random(size).view(Reversed)

        def __getattr__(self, name):
            return getattr(self._rng, name)

    after = objective.corrupt(record(60, 0), Draws(generator(0, "x")))
    np.testing.assert_array_equal(before.tokens, after.tokens)
    np.testing.assert_array_equal(before.weights, after.weights)


def test_an_iid_draw_has_no_budget():
    with pytest.raises(UserError, match="max_predictions"):
        MaskedLM(selection="iid", max_predictions=20)
