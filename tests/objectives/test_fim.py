"""Fill-in-the-middle: its three layouts, what it adds, and that documents come back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from objectives.fim import FIM
from t5like.data.examples import Document, Record, Window
from t5like.data.rng import generator
from t5like.errors import UserError

EOS, PRE, MID, SUF = 1, 905, 906, 907  # lent the 6th to 8th sentinel from the end
MARKS = (PRE, MID, SUF)


def documents_of(record, sizes, closed, seed=0):
    """A window's record: documents of these sizes, each closed by EOS, the last one if asked."""
    lengths = [size + 1 for size in sizes]
    lengths[-1] -= not closed
    drawn = record(sum(lengths), seed, lengths)
    tokens = drawn.tokens.copy()
    ends = np.cumsum(lengths) - 1
    tokens[ends if closed else ends[:-1]] = EOS
    return dataclasses.replace(drawn, tokens=tokens)


def bind(setting, length=64, **fields):
    return FIM(**fields).bind(setting("decoder", length))


class Cuts:
    """Draws for one document: permuted, its mode, its two cut places."""

    def __init__(self, *cuts):
        self.cuts = cuts

    def random(self, count):
        return np.zeros(count)

    def integers(self, low, high, size, endpoint):
        assert endpoint and size == (1, 2)
        assert (low <= self.cuts).all() and (self.cuts <= high).all()
        return np.array([self.cuts])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"spm_rate": 0.0}, [PRE, 10, 11, SUF, 13, MID, 12, EOS]),
        ({"spm_rate": 1.0, "spm_variant": 1}, [SUF, 13, PRE, 10, 11, MID, 12, EOS]),
        ({"spm_rate": 1.0, "spm_variant": 2}, [PRE, SUF, 13, MID, 10, 11, 12, EOS]),
    ],
)
def test_the_layouts(setting, fields, expected):
    tokens = np.array([10, 11, 12, 13], np.int32)
    objective = bind(setting, fim_rate=1.0, **fields)
    example = objective.corrupt(Record(tokens, np.zeros(4, np.int32)), Cuts(3, 2))
    assert example.targets.tolist() == expected
    assert len(example.inputs) == 0 and not example.bidirectional_inputs
    assert objective.unpermute(example.targets).tolist() == [*tokens.tolist(), EOS]


def test_empty_parts(setting):
    tokens = np.array([10, 11], np.int32)
    for cuts, expected in [
        ((0, 0), [PRE, SUF, 10, 11, MID, EOS]),
        ((2, 2), [PRE, 10, 11, SUF, MID, EOS]),
        ((0, 2), [PRE, SUF, MID, 10, 11, EOS]),
    ]:
        objective = bind(setting, fim_rate=1.0, spm_rate=0.0)
        example = objective.corrupt(Record(tokens, np.zeros(2, np.int32)), Cuts(*cuts))
        assert example.targets.tolist() == expected


def test_prompt_and_answer_are_what_is_trained(setting):
    objective = bind(setting, fim_rate=1.0, spm_rate=0.0)
    form, tokens = objective.infilling(), np.arange(10, 20, dtype=np.int32)
    asked = [*form.prompt([tokens[:4], tokens[7:]]), *form.answer([tokens[4:7]])]
    example = objective.corrupt(Record(tokens, np.zeros(10, np.int32)), Cuts(4, 7))
    assert example.targets.tolist() == asked
    assert objective.named_tokens == {
        PRE: "<fim_prefix>", MID: "<fim_middle>", SUF: "<fim_suffix>",
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from(["window", "document"]),
    st.sampled_from([(0.0, 2), (1.0, 1), (1.0, 2), (0.5, 2)]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.sampled_from([None, 1, 20]),
    st.integers(0, 10**6),
)
def test_documents_come_back_with_three_marks_more(
    setting, record, sizes, closed, cut, spm, rate, end_every_middle, most, seed
):
    objective = bind(
        setting, 400, cut=cut, fim_rate=rate, spm_rate=spm[0], spm_variant=spm[1],
        end_every_middle=end_every_middle, max_permuted=most,
    )  # fmt: skip
    if cut == "document":
        drawn = dataclasses.replace(record(sizes[0], seed), ends_document=closed)
        before = drawn.tokens.tolist() + [EOS] * closed
    else:
        drawn = documents_of(record, sizes, closed or sizes[-1] == 0, seed)
        before = drawn.tokens.tolist()
    after = objective.corrupt(drawn, generator(seed, "corrupt"))
    bound = objective.bounds(len(drawn.tokens), generator(seed, "corrupt"))
    ids = after.targets
    assert len(ids) <= bound.targets <= 400 and ids.dtype == np.int32

    restored = objective.unpermute(ids).tolist()
    added = len(restored) - len(before)
    assert restored == before + [EOS] * added
    counts = [(ids == mark).sum() for mark in MARKS]
    assert counts[0] == counts[1] == counts[2]
    assert len(ids) == len(before) + 3 * counts[0] + added
    assert added <= (end_every_middle and counts[0] > 0 and before[-1:] != [EOS])
    assert counts[0] <= objective._most_permuted
    if cut == "document" and rate != 0.5:
        assert counts[0] == rate
    if after.target_documents is not None:
        for d in np.unique(drawn.documents):
            text = drawn.tokens[drawn.documents == d].tolist()
            mine = objective.unpermute(ids[after.target_documents == d]).tolist()
            assert mine[: len(text)] == text and set(mine[len(text) :]) <= {EOS}


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("fields", [{"spm_rate": 0.0}, {"spm_variant": 1}, {"spm_variant": 2}])
def test_documents_of_no_and_one_token_survive(setting, record, length, fields):
    objective = bind(setting, fim_rate=1.0, **({"spm_rate": 1.0} | fields))
    example = objective.corrupt(record(length), generator(0, "x"))
    assert sorted(set(example.targets.tolist()) & set(MARKS)) == sorted(MARKS)
    assert len(example.targets) == length + 4
    assert objective.unpermute(example.targets).tolist() == [*record(length).tokens, EOS]


def test_a_middle_ends_where_its_piece_does(setting, record):
    piece = dataclasses.replace(record(20), ends_document=False)
    for end_every_middle, ends in [(True, 1), (False, 0)]:
        for cut in ("document", "window"):
            objective = bind(setting, fim_rate=1.0, cut=cut, end_every_middle=end_every_middle)
            ids = objective.corrupt(piece, generator(0, "x")).targets
            assert (ids == EOS).sum() == ends and len(ids) == 23 + ends
    plain = bind(setting, fim_rate=0.0).corrupt(piece, generator(0, "x"))
    assert plain.targets.tolist() == piece.tokens.tolist()


@pytest.mark.parametrize(
    ("fields", "unit"),
    [
        ({}, Document(508)),
        ({"fim_rate": 0.0}, Document(511)),
        ({"cut": "window"}, Window(499, EOS)),  # four documents of three marks, and an EOS
        ({"cut": "window", "max_permuted": 1}, Window(508, EOS)),
        ({"cut": "window", "fim_rate": 0.0}, Window(512, EOS)),
    ],
)
def test_marks_are_in_the_plan(setting, record, fields, unit):
    objective = bind(setting, 512, **fields)
    assert objective.unit == unit
    raw = unit.max_raw_length if isinstance(unit, Document) else unit.raw_length
    assert max(objective.bounds(raw, generator(s, "x")).targets for s in range(20)) == 512


def test_rates_of_documents_and_of_modes(setting, record):
    drawn = documents_of(record, [9] * 20, closed=True)
    objective = bind(setting, 512, cut="window", max_permuted=20)
    rows = [objective.corrupt(drawn, generator(s, "x")).targets for s in range(100)]
    texts = [text for row in rows for text in np.split(row, (row == EOS).nonzero()[0] + 1)[:-1]]
    assert len(texts) == 2000
    permuted = [text for text in texts if MID in text]
    spm = sum(text[1] == SUF for text in permuted)
    assert abs(len(permuted) - 1000) <= 3 * np.sqrt(500)
    # A tenth of the cuts leave PSM an empty prefix, which reads as SPM does: 1 - (1 - 1/10)^2.
    share = 0.5 + 0.5 * 0.19
    expected = len(permuted) * share
    assert abs(spm - expected) <= 3 * np.sqrt(expected * (1 - share))


def test_half_of_the_documents_are_permuted(setting, record):
    objective, drawn = FIM().bind(setting("decoder", 64)), record(9)
    texts = (objective.corrupt(drawn, generator(s, "x")).targets for s in range(2000))
    assert abs(sum(MID in text for text in texts) - 1000) <= 3 * np.sqrt(500)


def test_cuts_are_uniform(setting, record):
    objective = bind(setting, fim_rate=1.0, spm_rate=0.0)
    drawn, places = record(4), []
    for s in range(2000):
        ids = objective.corrupt(drawn, generator(s, "x")).targets.tolist()
        places.append((ids.index(SUF) - 1, len(ids) - 2 - ids.index(MID)))
    pairs = np.zeros((5, 5))
    for prefix, middle in places:
        pairs[prefix, prefix + middle] += 1
    # Two of 5 places in either order: 1/25 where they are equal, 2/25 where not.
    expected = (np.triu(np.full((5, 5), 2), 1) + np.eye(5)) * 2000 / 25
    assert (np.abs(pairs - expected) <= 4 * np.sqrt(expected)).all()


def test_which_documents_of_a_window_are_permuted_does_not_depend_on_their_place(setting, record):
    drawn = documents_of(record, [4] * 10, closed=True)
    objective = bind(setting, 128, cut="window", fim_rate=1.0, max_permuted=2)
    counts = np.zeros(10)
    for s in range(600):
        ids = objective.corrupt(drawn, generator(s, "x")).targets
        texts = np.split(ids, (ids == EOS).nonzero()[0] + 1)[:-1]
        counts += [MID in text for text in texts]
    assert counts.sum() == 1200
    np.testing.assert_allclose(counts, 120, atol=4 * np.sqrt(120 * 0.8))


@pytest.mark.parametrize(
    ("fields", "vocabulary", "message"),
    [
        ({}, {"length": 5}, "train.length is 5; FIM .*at least 6"),
        ({"cut": "window", "max_permuted": 20}, {}, "up to 20 documents.* at least 63"),
        ({}, {"num_sentinels": 7}, "FIM needs a token '<fim_suffix>'"),
    ],
)
def test_what_cannot_work_is_an_error(setting, fields, vocabulary, message):
    with pytest.raises(UserError, match=message):
        FIM(**fields).bind(setting("decoder", **{"length": 60} | vocabulary))


@pytest.mark.parametrize("fields", [{"fim_rate": 1.1}, {"spm_rate": -1.0}, {"spm_variant": 3}])
def test_fields_are_checked(fields):
    with pytest.raises(UserError, match=f"FIM.{next(iter(fields))} is"):
        FIM(**fields)
