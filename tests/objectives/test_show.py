"""Examples as people read them: what is marked as what."""

from __future__ import annotations

import types

import numpy as np
import pytest

from objectives import show
from objectives.show_reader import Reader
from t5like.data.examples import Aligned, Members, Record, Seq2Seq
from t5like.data.layout import lay_out
from t5like.data.vocabularies.bytes import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=10)
FIRST, SECOND, _, LENT = VOCABULARY.sentinels[[0, 1, 2, -1]].tolist()
EOS = VOCABULARY.eos_id


def ids(*parts):
    """Texts and ids, joined."""
    encoded = [VOCABULARY.encode(x) if isinstance(x, str) else [x] for x in parts]
    return np.concatenate(encoded).astype(np.int32)


def lines(window, example, architecture, *, readable=None, names=None):
    """The lines of an example, {label: runs}."""
    objective = types.SimpleNamespace(
        named_tokens=names or {}, readable=lambda row, reader: readable
    )
    component = types.SimpleNamespace(objective=objective, name="Toy")
    record = Record(ids(window), np.zeros(len(ids(window)), np.int32))
    drawn = types.SimpleNamespace(index=0, record=record, component=component, example=example)
    batch = lay_out(
        [[example]], architecture=architecture, length=40, targets_length=30, bos_id=0, pad_id=0,
        members=2 if isinstance(example, Members) else 1, sees_ahead=True,
    )  # fmt: skip
    row = {name: array[0] for name, array in batch.items()}
    return dict(show.as_lines(drawn, row, VOCABULARY)), show.as_json(drawn, row, VOCABULARY)


SPANS = Seq2Seq(ids("a ", FIRST, " c ", SECOND, EOS), ids(FIRST, "bee", SECOND, "dee", EOS))


def test_a_span_and_its_sentinel_share_a_number_on_both_sides_and_in_the_window():
    shown, _ = lines("a bee c dee", SPANS, "encoder_decoder")
    assert shown["window"] == [
        ("a ", "quiet"), ("bee", "span 0"), (" c ", "quiet"), ("dee", "span 1"),
    ]  # fmt: skip
    assert shown["encoder sees"] == [
        ("a ", "given"), ("<extra_id_0>", "sentinel 0"), (" c ", "given"),
        ("<extra_id_1>", "sentinel 1"), ("</s>", "special"),
    ]  # fmt: skip
    assert shown["decoder says"] == [
        ("<extra_id_0>", "sentinel 0"), ("bee", "span 0"),
        ("<extra_id_1>", "sentinel 1"), ("dee", "span 1"), ("</s>", "special"),
    ]  # fmt: skip


def test_a_window_that_cannot_be_rebuilt_is_shown_plain():
    shown, _ = lines("something else", SPANS, "encoder_decoder")
    assert shown["window"] == [("something else", "quiet")]


def test_named_tokens_read_as_their_names():
    example = Seq2Seq(ids(LENT, "a ", FIRST, EOS), ids(FIRST, "b", EOS))
    shown, record = lines("a b", example, "encoder_decoder", names={LENT: "[X]"})
    assert shown["encoder sees"][:2] == [("[X]", "named"), ("a ", "given")]
    assert record["text"]["encoder_input_tokens"] == "[X]a <extra_id_0>"
    assert shown["window"] == [("a ", "quiet"), ("b", "span 0")]


def test_a_numbered_mark_is_a_sentinel_and_its_span_follows_its_last_mention():
    causal = Seq2Seq(ids(""), ids("a ", LENT, " c", EOS, LENT, "b"))
    shown, _ = lines("a b c", causal, "decoder", names={LENT: "<mask_3>"})
    assert shown["decoder says"] == [
        ("a ", "target"),
        ("<mask_3>", "sentinel 3"),
        (" c", "target"),
        ("</s>", "special"),
        ("<mask_3>", "sentinel 3"),
        ("b", "span 3"),
    ]


def test_what_says_the_window_stands_alone():
    causal = Seq2Seq(ids(""), ids("hello", EOS))
    shown, _ = lines("hello", causal, "decoder")
    assert shown == {"decoder says": [("hello", "target"), ("</s>", "special")]}
    for both_ways, words in ((True, "seen both ways"), (False, "seen from the left")):
        prefix = Seq2Seq(ids("hel"), ids("lo"), bidirectional_inputs=both_ways)
        shown, _ = lines("hello", prefix, "decoder")
        assert shown == {
            f"prefix ({words})": [("hel", "given")], "decoder says": [("lo", "target")],
        }  # fmt: skip


def test_masked_tokens_by_what_is_shown_of_them():
    mask = VOCABULARY.mask_id
    weights = np.array([0, 1, 0, 1, 0, 1], np.float32)
    example = Aligned(ids("a", mask, "cxef"), ids("abcd", "ef"), weights)
    shown, _ = lines("abcdef", example, "encoder")
    assert shown["encoder sees"] == [
        ("a", "given"), ("[MASK]", "mask"), ("c", "given"), ("x", "random"), ("e", "given"),
        ("f", "kept"),
    ]  # fmt: skip
    assert [text for text, style in shown["encoder says"] if style == "target"] == ["b", "d", "f"]
    assert [text for text, style in shown["window"] if style == "target"] == ["b", "d", "f"]


def test_line_breaks_that_are_asked_for_can_be_seen():
    weights = np.array([0, 1, 0], np.float32)
    shown, _ = lines("a\nb", Aligned(ids("a", FIRST, "b"), ids("a\nb"), weights), "encoder")
    assert ("⏎", "target") in shown["encoder says"]


def test_members_are_told_apart():
    def member(text):
        return Aligned(ids(text), ids(text), np.zeros(len(text), np.float32))

    shown, record = lines("ab", Members((member("one"), member("two"))), "encoder")
    assert shown["1. encoder sees"] == [("one", "given")]
    assert shown["2. encoder sees"] == [("two", "given")]
    assert record["text"]["encoder_input_tokens"] == ["one", "two"]
    assert np.shape(record["features"]["encoder_positions"]) == (2, 40)


def test_an_objective_may_say_how_its_examples_read():
    own = [("my line", [("text", "given")])]
    shown, _ = lines("hello", Seq2Seq(ids(""), ids("hello")), "decoder", readable=own)
    assert shown == {"window": [("hello", "target")], "my line": [("text", "given")]}


@pytest.mark.parametrize("style", ["random", "kept"])
def test_a_named_token_is_named_even_where_it_is_asked_for(style):
    reader = Reader(VOCABULARY, {LENT: "[M1]"})
    assert reader.runs(ids("a", LENT), style) == [("a", style), ("[M1]", "named")]
    assert reader.sentinel_numbers(ids(FIRST, LENT, SECOND)) == [0, 1]


def test_runs_join_to_the_text():
    text = ids("naïve\n  text")
    runs = Reader(VOCABULARY).runs(text, lambda i: "given" if i % 5 < 2 else "target")
    assert len(runs) == 6 and "".join(part for part, _ in runs) == "naïve\n  text"
