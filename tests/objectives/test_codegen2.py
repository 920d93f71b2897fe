"""CodeGen2: its layout, the plan of its lengths, and that the text comes back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from objectives import codegen2
from objectives.causal_lm import CausalLM
from objectives.codegen2 import CodeGen2
from objectives.noise import Spans
from t5like.data.examples import Record
from t5like.data.rng import generator
from t5like.errors import UserError

EOS, SEP, EOM = 1, 903, 904  # <sep> and <eom> are lent the 4th and 5th sentinel from the end
MASKS = list(range(999, 904, -1))


def restored(ids):
    """The text before infilling: each document's spans put back where their masks stand."""
    ids, out = ids.tolist(), []
    while SEP in ids:
        body, ids = ids[: ids.index(SEP)], ids[ids.index(SEP) + 1 :]
        used = [token for token in body if token in MASKS]
        assert used and used == MASKS[: len(used)] and body[-1] == EOS
        assert not any(a in MASKS and b in MASKS for a, b in zip(body, body[1:], strict=False))
        for mask in used:
            end = ids.index(EOM)
            span, at = ids[1:end], body.index(mask)
            assert ids[0] == mask and span and EOS not in span
            body[at : at + 1], ids = span, ids[end + 1 :]
        out += body
    return out + ids


def stream(record, sizes, closed, seed=0):
    """A window's record: documents of these sizes, each closed by EOS, the last one if asked."""
    drawn = record(sum(sizes), seed, sizes)
    ends = np.cumsum(sizes) - 1
    tokens = drawn.tokens.copy()
    tokens[ends if closed else ends[:-1]] = EOS
    return dataclasses.replace(drawn, tokens=tokens)


@pytest.fixture
def placed(monkeypatch):
    """Sets the spans that the next records hide."""

    def place(*spans):
        starts, ends = np.array(spans).T
        monkeypatch.setattr(codegen2, "_placed", lambda *_: Spans(starts, ends))

    return place


def infilled(setting, tokens, documents=None, length=64, **fields):
    objective = CodeGen2(infill_rate=1.0, **fields).bind(setting("decoder", length))
    tokens = np.array(tokens, np.int32)
    documents = np.zeros_like(tokens) if documents is None else np.array(documents, np.int32)
    return objective.corrupt(Record(tokens, documents), generator(0, "x"))


def test_the_layout_of_one_document(setting, placed):
    placed((1, 3), (5, 6))
    one, two = MASKS[:2]
    layout = [10, one, 13, 14, two, 16, EOS, SEP, one, 11, 12, EOM, two, 15, EOM]
    for tokens, cut in [
        ([10, 11, 12, 13, 14, 15, 16], "document"),
        ([10, 11, 12, 13, 14, 15, 16], "window"),  # its EOS is behind the window's end
        ([10, 11, 12, 13, 14, 15, 16, EOS], "window"),
    ]:
        example = infilled(setting, tokens, cut=cut)
        assert example.targets.tolist() == layout
        assert len(example.inputs) == 0 and not example.bidirectional_inputs


def test_documents_are_infilled_one_by_one_and_no_span_crosses(setting, placed):
    placed((1, 5), (6, 8), (11, 14), (15, 16))
    tokens = [10, 11, 12, EOS, 20, 21, 22, 23, EOS, 30, EOS, EOS, 40, 41, 42, 43]
    documents = [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4]
    example = infilled(setting, tokens, documents)
    one = MASKS[0]
    expected = [
        ([10, one, EOS, SEP, one, 11, 12, EOM], 0),
        ([20, 21, one, EOS, SEP, one, 22, 23, EOM], 1),
        ([30, EOS], 2),  # no span begins here
        ([EOS], 3),  # the span that begins on an EOS hides nothing
        ([40, 41, 42, one, EOS, SEP, one, 43, EOM], 4),
    ]
    assert example.targets.tolist() == [x for ids, _ in expected for x in ids]
    assert example.target_documents.tolist() == [d for ids, d in expected for _ in ids]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from(["window", "document"]),
    st.sampled_from([(0.05, 0.5, 1, 64), (0.0, 0.999, 1, 1), (0.9, 0.999, 1, 3), (0.3, 0.3, 5, 5)]),
    st.sampled_from([None, 1, 7]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 10**6),
)
def test_texts_come_back_within_bounds(
    setting, record, sizes, closed, cut, ranges, most, rate, seed
):
    names = ("min_ratio", "max_ratio", "min_span_length", "max_span_length")
    fields = dict(zip(names, ranges, strict=True)) | {"infill_rate": rate, "max_spans": most}
    objective = CodeGen2(cut=cut, **fields).bind(setting("decoder", 600))
    if cut == "document":
        drawn = dataclasses.replace(record(sizes[0], seed), ends_document=closed)
    else:
        drawn = stream(record, sizes, closed, seed)
    example = objective.corrupt(drawn, generator(seed, "corrupt"))
    bound = objective.bounds(len(drawn.tokens), generator(seed, "corrupt"))
    assert len(example.targets) <= bound.targets <= 600 and bound.inputs == 0
    assert example.targets.dtype == np.int32

    if rate == 0:
        assert SEP not in example.targets
    elif rate == 1 and cut == "document":
        assert SEP in example.targets
    documents = example.target_documents
    if documents is None:
        documents = np.zeros(len(example.targets), np.int32)
    assert (np.diff(documents) >= 0).all()
    for d in np.unique(drawn.documents):
        text, ids = drawn.tokens[drawn.documents == d].tolist(), example.targets[documents == d]
        if SEP in ids or (cut == "document" and closed):
            text += [EOS] if text[-1] != EOS else []
        assert restored(ids) == text


@pytest.mark.parametrize("cut", ["window", "document"])
@pytest.mark.parametrize("length", [0, 1])
def test_nothing_and_a_single_token(setting, record, cut, length):
    end = [EOS] * (cut == "document")
    tokens = record(length).tokens.tolist()
    causal = CodeGen2(cut=cut, infill_rate=0.0).bind(setting("decoder", 64))
    assert causal.corrupt(record(length), generator(0, "x")).targets.tolist() == tokens + end
    example = infilled(setting, tokens, cut=cut)
    hidden = [MASKS[0], EOS, SEP, MASKS[0], *tokens, EOM]
    assert example.targets.tolist() == (hidden if length else end)


@pytest.mark.parametrize("cut", ["window", "document"])
@pytest.mark.parametrize("length", [64, 512, 2048])
def test_rows_are_full_in_the_worst_case_and_never_overfull(setting, cut, length):
    objective = CodeGen2(cut=cut).bind(setting("decoder", length))
    raw = objective.unit.raw_length if cut == "window" else objective.unit.max_raw_length
    most = max(objective.bounds(raw, generator(s, "x")).targets for s in range(2000))
    assert length - 6 <= most <= length
    assert raw > 0.85 * length
    causal = CodeGen2(cut=cut, infill_rate=0.0).bind(setting("decoder", length))
    assert causal.unit == CausalLM(cut=cut).bind(setting("decoder", length)).unit


def test_a_window_of_many_documents_fits(setting, record):
    objective = CodeGen2(infill_rate=1.0, min_ratio=0.5, max_span_length=1, max_spans=20).bind(
        setting("decoder", 200)
    )
    raw = objective.unit.raw_length
    assert raw == 200 - 4 * 20 - 1
    drawn = stream(record, [2] * (raw // 2) + [1] * (raw % 2), closed=False)
    sizes = [len(objective.corrupt(drawn, generator(s, "x")).targets) for s in range(300)]
    assert max(sizes) <= 200
    assert max(sizes) > raw + 3 * 20 / 2  # about half of the spans begin on an EOS


def test_half_of_the_records_are_infilled(setting, record):
    objective = CodeGen2().bind(setting("decoder", 512))
    drawn, draws = record(400), 2000
    examples = [objective.corrupt(drawn, generator(s, "x")).targets for s in range(draws)]
    infills = [ids for ids in examples if SEP in ids]
    assert abs(len(infills) - draws / 2) <= 3 * np.sqrt(draws / 4)
    assert all(ids.tolist() == drawn.tokens.tolist() for ids in examples if SEP not in ids)
    # Uniform over [0.05, 0.5], but where max_spans is too small for the draw. A mask stands for
    # each span, so that what lacks in front of EOS is a little less than what is hidden.
    hidden = [1 - ids.tolist().index(EOS) / 400 for ids in infills]
    assert 0.2 < np.mean(hidden) < 0.28 and min(hidden) < 0.08 and max(hidden) > 0.44


def test_span_lengths_and_places_are_uniform(setting, record):
    """Lengths over their range (the last one apart), places over all tokens."""
    fields = dict(min_ratio=0.4, max_ratio=0.4, min_span_length=2, max_span_length=6)
    objective = CodeGen2(infill_rate=1.0, **fields).bind(setting("decoder", 200))
    lengths = [objective._wanted(100, generator(s, "x")) for s in range(800)]
    assert {int(x.sum()) for x in lengths} == {40}
    counts = np.bincount(np.concatenate([x[:3] for x in lengths]), minlength=7)
    assert counts[:2].sum() == 0
    np.testing.assert_allclose(counts[2:], 480, atol=4 * np.sqrt(480))
    hidden = np.zeros(100)
    for s, x in enumerate(lengths):
        spans = codegen2._placed(x, 100, generator(s, "y"))
        assert (spans.starts[1:] > spans.ends[:-1]).all()
        for start, end in zip(*spans, strict=True):
            hidden[start:end] += 1
    middle = hidden[10:90] / 800
    assert abs(middle.mean() - 0.4) < 0.03 and middle.std() < 0.03


def test_prompt_and_answer_are_what_is_trained(setting, placed):
    placed((2, 4), (5, 6))
    tokens = np.arange(10, 20)
    objective = CodeGen2(infill_rate=1.0, cut="document").bind(setting("decoder", 64))
    form = objective.infilling()
    parts = [tokens[:2], tokens[4:5], tokens[6:]]
    asked = [*form.prompt(parts), *form.answer([tokens[2:4], tokens[5:6]])]
    assert infilled(setting, tokens, cut="document").targets.tolist() == asked
    assert form.most_blanks == 2  # one more than half of 64 tokens asks for
    names = objective.named_tokens
    assert names[MASKS[1]] == "<mask_2>" and (names[SEP], names[EOM]) == ("<sep>", "<eom>")


class CodeGen2Vocabulary:
    """A vocabulary with CodeGen2's own pieces."""

    eos_id, pad_id, bos_id, size = 1, 0, 0, 100
    sentinels = np.empty(0, np.int32)
    pieces = {"<mask_1>": 50, "<mask_2>": 51, "<sep>": 60, "<eom>": 61}

    def named_id(self, name):
        return self.pieces.get(name)


def test_own_pieces_serve(setting):
    bound = CodeGen2(max_spans=2).bind(
        dataclasses.replace(setting("decoder", 64), vocabulary=CodeGen2Vocabulary())
    )
    form = bound.infilling()
    assert (form.masks.tolist(), form.sep_id, form.eom_id) == ([50, 51], 60, 61)


@pytest.mark.parametrize(
    ("fields", "vocabulary", "message"),
    [
        ({"max_spans": 96}, {}, "needs 96 masks.* has 95: raise ToyVocabulary.extra_ids by 1"),
        ({}, {"num_sentinels": 5}, "needs 1 masks.* has 0: raise ToyVocabulary.extra_ids by 1"),
        ({}, {"num_sentinels": 3}, "needs a token '<sep>'"),
        ({}, {"length": 6}, "train.length is 6; CodeGen2 needs at least 7"),
    ],
)
def test_what_cannot_work_is_an_error(setting, fields, vocabulary, message):
    with pytest.raises(UserError, match=message):
        CodeGen2(**fields).bind(setting("decoder", **{"length": 4096} | vocabulary))


@pytest.mark.parametrize(
    "fields", [{"infill_rate": 1.1}, {"min_ratio": 0.6}, {"max_span_length": 0}, {"max_spans": 0}]
)
def test_fields_are_checked(fields):
    with pytest.raises(UserError, match=f"CodeGen2.{next(iter(fields))} is"):
        CodeGen2(**fields)
