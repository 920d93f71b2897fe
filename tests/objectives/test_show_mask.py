"""Who sees whom, as text: known pictures of small rows."""

from __future__ import annotations

import numpy as np

from objectives import show_mask
from objectives.show_reader import Reader
from t5like.data.examples import Aligned, Members, Seq2Seq
from t5like.data.layout import lay_out
from t5like.data.vocabularies.bytes import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=10)
READER = Reader(VOCABULARY)


def ids(text):
    return VOCABULARY.encode(text).astype(np.int32)


def aligned(text, **features):
    tokens = ids(text)
    return Aligned(tokens, tokens, np.ones(len(tokens), np.float32), features=features)


def laid_out(*examples, architecture, length=12, features=(), across=True, members=1):
    batch = lay_out(
        [examples], architecture=architecture, length=length, targets_length=6, bos_id=0,
        pad_id=0, features=features, attend_across_documents=across, members=members,
        sees_ahead=True,
    )  # fmt: skip
    return {name: array[0] for name, array in batch.items()}


def blocks(runs):
    """The picture's marks alone, line by line."""
    text = "".join(text for text, _ in runs).splitlines()
    return [line[13:].rstrip() for line in text if set(line[13:]) <= set(" ▀▄█")]


def test_causal_and_prefix():
    causal = laid_out(Seq2Seq(ids(""), ids("abcd")), architecture="decoder")
    assert show_mask.as_json(causal) == {"decoder": ["1000", "1100", "1110", "1111"]}
    ((title, runs),) = show_mask.pictures(causal, READER)
    assert title == "the decoder's 4 slots see each other (queries downwards, keys across)"
    assert blocks(runs) == ["█▄", "███▄"]
    assert [style for text, style in runs if "█" in text] == ["target", "target"]

    prefix = laid_out(Seq2Seq(ids("ab"), ids("cd")), architecture="decoder")
    assert show_mask.as_json(prefix) == {"decoder": ["1110", "1110", "1110", "1111"]}
    ((_, runs),) = show_mask.pictures(prefix, READER)
    assert [style for text, style in runs if "█" in text] == ["given", "target"]


def test_labels_are_what_the_model_reads():
    row = laid_out(Seq2Seq(ids(""), ids("x\nyz")), architecture="decoder")
    ((_, runs),) = show_mask.pictures(row, READER)
    head, first, second = "".join(text for text, _ in runs).splitlines()
    assert head == " " * 13 + "px⏎y"
    assert first.startswith("<pad>x  ") and second.startswith("⏎y  ")


def test_an_odd_last_query_has_the_upper_half():
    row = laid_out(Seq2Seq(ids(""), ids("abc")), architecture="decoder")
    ((_, runs),) = show_mask.pictures(row, READER)
    assert blocks(runs) == ["█▄", "▀▀▀"]


def test_cross_attention_of_packed_examples():
    a, b = (Seq2Seq(ids(x), ids(y)) for x, y in (("ab", "c"), ("d", "efg")))
    row = laid_out(a, b, architecture="encoder_decoder")
    assert show_mask.as_json(row) == {
        "encoder": ["110", "110", "001"],
        "decoder": ["1000", "0100", "0110", "0111"],
        "decoder to encoder": ["110", "001", "001", "001"],
    }
    titles, pictures = zip(*show_mask.pictures(row, READER), strict=True)
    assert titles[2].startswith("the decoder's 4 slots see the encoder's 3 (queries")
    numbered = "".join(text for text, _ in pictures[0]).splitlines()
    assert numbered[0].split() == ["112"] and numbered[2][0] == "1" and numbered[3][0] == "2"


def test_isolated_slots():
    row = laid_out(
        aligned("abqq", isolated=np.array([0, 0, 1, 1])),
        architecture="encoder", features=("isolated",),
    )  # fmt: skip
    assert show_mask.as_json(row) == {"encoder": ["1100", "1100", "1110", "1101"]}


def test_no_picture_where_all_see_all():
    row = laid_out(aligned("abc"), architecture="encoder")
    assert show_mask.pictures(row, READER) == [
        ("the encoder's 3 slots see each other, all of them", [])
    ]


def test_long_rows_are_grouped_and_every_mark_kept():
    """130 queries that see themselves alone, in groups of three slots to a mark."""
    text = "a" * 130
    row = laid_out(
        aligned(text, isolated=np.ones(130)),
        architecture="encoder", length=150, features=("isolated",),
    )  # fmt: skip
    ((title, runs),) = show_mask.pictures(row, READER)
    assert title.endswith("; a mark is 3 by 3 slots)")
    lines = blocks(runs)
    assert len(lines) == 22 and max(map(len, lines)) == 44
    assert lines[0] == "▀▄" and lines[21].strip() == "▀▄"


def test_each_member_has_its_own():
    pair = Members((aligned("abc"), aligned("de")))
    row = laid_out(pair, architecture="encoder", members=2)
    assert show_mask.as_json(row) == [
        {"encoder": ["111", "111", "111"]}, {"encoder": ["11", "11"]},
    ]  # fmt: skip
    assert [title[:20] for title, _ in show_mask.pictures(row, READER)] == [
        "1. the encoder's 3 s", "2. the encoder's 2 s",
    ]  # fmt: skip
